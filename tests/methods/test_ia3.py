"""(IA)^3 beside PEFT's: the same forward pass, gradients, steps and files; and what cannot be rescaled is refused."""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from qlite.errors import RecipeError
from qlite.formats.merged import merged_tensors
from qlite.formats.peft import write_adapter
from qlite.methods.base import trainable_tensors
from qlite.methods.ia3 import IA3, ScaledLinear
from tests.families import FAMILIES, saved_folder
from tests.formats.test_peft import logits_of, ours, theirs
from tests.tiny import tiny_llama

KINDS = {
    "as in the paper": IA3(),
    "attention and all of the MLP": IA3(targets=("q_proj", "up_proj", "down_proj"), feedforward=("up_proj", "down_proj")),
    "one block, and a layer of either kind": IA3(targets=("*.1.*",), feedforward=("*.1.mlp.down_proj", "o_proj")),
    "outputs alone": IA3(targets="attention", feedforward=()),
}


def moved(model: nn.Module) -> None:
    """Move each factor off 1, by its place in the model."""
    generator = torch.Generator().manual_seed(3)
    for tensor in trainable_tensors(model).values():
        tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)


def saved(folder: Path, method: IA3, family: str = "qwen2") -> tuple[nn.Module, nn.Module]:
    """Return our model with moved factors, and PEFT's reading of its files over the same base."""
    base = saved_folder(folder, FAMILIES[family])
    model = ours(base)
    method.attach(model)
    moved(model)
    write_adapter(folder / "adapter", model, method, str(base))
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return model, peft.PeftModel.from_pretrained(theirs(base), folder / "adapter", is_trainable=True)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_our_files_and_answers_the_same(kind, tmp_path):
    model, other = saved(tmp_path, KINDS[kind])
    torch.testing.assert_close(logits_of(model), logits_of(other), atol=2e-6, rtol=1e-5)
    assert sum(isinstance(module, ScaledLinear) for module in model.modules()) == sum(
        isinstance(module, peft.tuners.ia3.IA3Layer) for module in other.modules()
    )


def test_peft_has_the_same_gradients_and_the_same_factors_after_five_steps(tmp_path):
    model, other = saved(tmp_path, IA3())
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(2))
    found = []
    for each in (model.train(), other.train()):
        factors = [p for p in each.parameters() if p.requires_grad]
        optimizer, first = torch.optim.AdamW(factors, lr=1e-2), None
        for _ in range(5):
            optimizer.zero_grad()
            logits = each(input_ids=ids).logits
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            first = first or [p.grad.clone() for p in factors]
            optimizer.step()
        found.append((first, [p.detach() for p in factors]))
    assert len(found[0][0]) == 2 * 3
    for kind in (0, 1):
        for mine, their in zip(found[0][kind], found[1][kind], strict=True):
            torch.testing.assert_close(mine, their, atol=1e-6, rtol=1e-4)


def test_keys_and_values_have_biases_that_are_merged_as_the_weights_are(tmp_path):
    model, _ = saved(tmp_path, IA3())
    plain = theirs(saved_folder(tmp_path, FAMILIES["qwen2"]))
    assert plain.model.layers[0].self_attn.v_proj.bias.abs().sum() > 0
    plain.load_state_dict({tensor.name: tensor.whole() for tensor in merged_tensors(model)}, strict=False)
    torch.testing.assert_close(logits_of(plain), logits_of(model), atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_in_bfloat16_a_factor_near_1_keeps_its_distance_from_it():
    """Rounded to bfloat16 itself, 1.01 would be 1.0078."""
    linear = ScaledLinear(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16), scales_input=False)
    before = linear(torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).bfloat16())
    linear.ia3_l.fill_(1.01)
    ratio = float((linear._scaled(before).float() * before).sum() / before.float().square().sum())
    assert ratio == pytest.approx(1.01, abs=5e-4)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (IA3(targets=("k_prj", "down_proj")), 'method.targets: no linear layer is called "k_prj"; did you mean "k_proj"?'),
        (
            IA3(targets=("k_proj", "v_proj")),
            'method.feedforward: "down_proj" is none of the 4 layers of method.targets; add it there, or set method.feedforward = [] where '
            "no layer's input is to be rescaled",
        ),
    ],
)
def test_what_names_no_layer_is_refused(method, message):
    with pytest.raises(RecipeError) as caught:
        method.attach(tiny_llama())
    assert str(caught.value) == message
