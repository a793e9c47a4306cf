"""What stands beside attention and input, against PEFT's modules and the papers: equal outputs, gradients, and tensors after some steps."""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlite.errors import RecipeError
from qlite.formats.peft import CONFIG, PEFT, WEIGHTS, write_adapter
from qlite.methods import METHODS, Combined, Method
from qlite.methods.base import saved_tensors, trainable_tensors
from qlite.model.checkpointing import checkpoint_blocks
from qlite.model.documents import attend_by_documents
from tests.families import FAMILIES, VOCAB, new_model, saved_folder
from tests.reference.llama_adapter import adapted_llama
from tests.tiny import tiny_llama

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
PREFIX_TUNING, PROMPT, ADAPTER, ADAPTER_V2 = (METHODS[name] for name in ("prefix", "prompt", "llama_adapter", "llama_adapter_v2"))
METHOD_OF = {
    "prefix": PREFIX_TUNING(length=5, hidden=8),
    "prefix, no MLP": PREFIX_TUNING(length=5, hidden=0),
    "prompt": PROMPT(length=5),
    "llama_adapter": ADAPTER(length=5, first_block=1, gate="block"),
}


def exact_llama(**changes) -> PreTrainedModel:
    """Return the tiny Llama in float64."""
    model = tiny_llama(**changes).double()
    attend_by_documents(model)
    return model


def attached(method: Method, model: PreTrainedModel, size: float = 0.3) -> PreTrainedModel:
    """Return ``model`` with ``method`` on it, all that is trained moved off its start, in the model's dtype."""
    method.attach(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in trainable_tensors(model).values():
            p.add_(torch.randn(p.shape, generator=generator) * size)
            p.data = p.data.to(model.dtype)
    return model


def loss_of(logits: Tensor, ids: Tensor = IDS) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def steps(model: PreTrainedModel, run, params: dict[str, nn.Parameter]) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Return the losses of three steps of plain descent, the first gradients, and the parameters after them."""
    optimizer = torch.optim.SGD(params.values(), lr=0.5)
    losses, first = [], {}
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(run())
        loss.backward()
        first = first or {name: p.grad.clone() for name, p in params.items()}
        optimizer.step()
        losses.append(loss.item())
    return losses, first, {name: p.detach() for name, p in params.items()}


def assert_alike(ours: tuple, theirs: tuple) -> None:
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), atol=1e-6, rtol=1e-6)
    assert ours[0][-1] < ours[0][0]
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine.keys() == other.keys()
        assert len(mine) > 0
        for name in mine:
            torch.testing.assert_close(mine[name], other[name], atol=1e-7, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# PEFT's modules, trained beside ours


def test_prefix_tuning_trains_what_pefts_prefix_encoder_does():
    ours = attached(PREFIX_TUNING(length=5, hidden=8), exact_llama())
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8)
    theirs = peft.get_peft_model(tiny_llama().double(), config).double()
    encoder, sides = theirs.prompt_encoder["default"], [block.self_attn.side for block in ours.model.layers]
    shared = sides[0].encoder
    theirs_of = {
        "embedding": encoder.embedding.weight,
        "inner.weight": encoder.transform[0].weight,
        "inner.bias": encoder.transform[0].bias,
        "outer.weight": encoder.transform[2].weight,
        "outer.bias": encoder.transform[2].bias,
    }
    with torch.no_grad():
        for name in ("embedding", "inner.weight", "inner.bias"):
            theirs_of[name].copy_(shared.get_parameter(name))
        for name in ("weight", "bias"):
            theirs_of[f"outer.{name}"].copy_(torch.cat([side.outer.get_parameter(name) for side in sides]))
    # PEFT adds the prefix's length to the positions that it is given: these are ours.
    positions = torch.arange(IDS.shape[1]).unsqueeze(0).expand(2, -1) - 5
    mask = torch.ones_like(IDS)
    theirs_found = steps(theirs, lambda: theirs(input_ids=IDS, position_ids=positions, attention_mask=mask).logits, theirs_of)
    found = steps(ours, lambda: ours(input_ids=IDS).logits, trainable_tensors(ours))

    def as_theirs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {name: tensors[f"model.layers.0.self_attn.side.encoder.{name}"] for name in ("embedding", "inner.weight", "inner.bias")}
        outer = {
            f"outer.{name}": torch.cat([tensors[f"model.layers.{i}.self_attn.side.outer.{name}"] for i in range(2)])
            for name in ("weight", "bias")
        }
        return own | outer

    assert_alike((found[0], as_theirs(found[1]), as_theirs(found[2])), theirs_found)


def test_prompt_tuning_trains_what_pefts_prompt_embedding_does():
    ours = attached(PROMPT(length=5), exact_llama())
    theirs = peft.get_peft_model(tiny_llama().double(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).double()
    weight = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(ours.model.soft_prompt.prompt)
    name = "model.soft_prompt.prompt"
    found = steps(ours, lambda: ours(input_ids=IDS).logits, trainable_tensors(ours))
    assert_alike(found, steps(theirs, lambda: theirs(input_ids=IDS).logits[:, 5:], {name: weight}))


@pytest.mark.parametrize("text", ["abc", (1, 2, 3)])
def test_more_tokens_than_a_prompt_has_vectors_are_refused_given_as_text_or_as_ids(text):
    with pytest.raises(RecipeError, match=r"method.text.*: is 3 tokens, and method.length = 2 of them .*; set method.length = 3"):
        PROMPT(length=2, text=text).resolved(lambda *_, **__: {"input_ids": [5, 6, 7]})
    assert PROMPT(length=3, text=text).resolved(lambda *_, **__: {"input_ids": [1, 2, 3]}).text == (1, 2, 3)


def test_llama_adapter_trains_what_pefts_adapted_attention_does():
    ours = attached(ADAPTER(length=5, first_block=1, gate="block"), exact_llama())
    theirs = peft.get_peft_model(tiny_llama().double(), peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=5, adapter_layers=1))
    layer = theirs.base_model.model.model.layers[1].self_attn
    place = "model.layers.1.self_attn.side"
    with torch.no_grad():
        layer.adaption_prompt.copy_(ours.get_parameter(f"{place}.prompt").unsqueeze(0))
        layer.adaption_gate.copy_(ours.get_parameter(f"{place}.gate"))
    theirs_of = {f"{place}.prompt": layer.adaption_prompt, f"{place}.gate": layer.adaption_gate}
    losses, *tensors = steps(theirs, lambda: theirs(input_ids=IDS).logits, theirs_of)
    flat = [{name: tensor.squeeze(0) if name.endswith("prompt") else tensor for name, tensor in each.items()} for each in tensors]
    # PEFT takes its softmax in float32.
    found = steps(ours, lambda: ours(input_ids=IDS).logits, trainable_tensors(ours))
    assert_alike(found, (losses, *flat))


# The papers


@pytest.mark.parametrize("method", [ADAPTER(length=5, first_block=1), ADAPTER_V2(length=5, first_block=1)], ids=lambda m: m.name)
def test_llama_adapter_is_the_papers(method):
    model = attached(method, exact_llama())
    fields = {name: p.detach().clone() for name, p in model.named_parameters()}
    # A norm that is trained has its frozen self beneath; that of the same name is the trained one.
    theirs_of = {name: fields[name].requires_grad_() for name in trainable_tensors(model)}
    found = steps(model, lambda: model(input_ids=IDS).logits, trainable_tensors(model))
    assert_alike(found, steps(model, lambda: adapted_llama(fields, model.config, IDS), theirs_of))
    assert len(theirs_of) == (2 if method.name == "llama_adapter" else 2 + 2 * 14 + 5)


def test_prefix_tuning_is_two_softmaxes_in_one():
    """Section 4.2: the prefix's keys and values stand before the sequence's own in each attention; one head, one block, by hand."""
    model = attached(PREFIX_TUNING(length=3, hidden=0), exact_llama(num_hidden_layers=1))
    attention = model.model.layers[0].self_attn
    seen = {}

    def attend(query, key, value, mask, documents, before):
        scores = query @ torch.cat([before[0].expand(2, -1, -1, -1), key], 2).repeat_interleave(2, 1).transpose(-1, -2) / 4
        scores[..., 3:] = scores[..., 3:].masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
        seen["out"] = scores.softmax(-1) @ torch.cat([before[1].expand(2, -1, -1, -1), value], 2).repeat_interleave(2, 1)
        return whole(query, key, value, mask, documents, before=before)

    side, whole = attention.side, None

    def forward(given, *rest):
        nonlocal whole
        whole = given
        out = type(side).forward(side, attend, *rest)
        seen["ours"] = out
        return out

    side.forward = forward
    model(input_ids=IDS)
    torch.testing.assert_close(seen["ours"], seen["out"].transpose(1, 2))


# Together with LoRA


@pytest.mark.parametrize("name", ["llama_adapter", "prefix", "prompt"])
def test_beside_lora_checkpointing_changes_no_gradient_and_siblings_stay_joined(name):
    """LLaMA-Adapter asks k_proj and v_proj once more, for its prompts: what the linears of one input share is not for that one."""
    found = []
    for kept in ("everything", "inputs", "attention"):
        model = tiny_llama()
        attend_by_documents(model)
        attached(Combined(parts=(METHODS["lora"](rank=4, dropout=0.1), METHOD_OF[name])), model).train()
        if kept != "everything":
            checkpoint_blocks(model, keep_attention=kept == "attention")
        torch.manual_seed(0)
        loss_of(model(input_ids=IDS).logits).backward()
        assert all(block.self_attn.k_proj.siblings is not None for block in model.model.layers)
        found.append({key: p.grad for key, p in trainable_tensors(model).items()})
    assert all(grad.abs().sum() > 0 for grad in found[0].values())
    for key, grad in found[0].items():
        assert torch.equal(grad, found[1][key]), key
        assert torch.equal(grad, found[2][key]), key


def test_two_modules_beside_one_attention_are_refused():
    with pytest.raises(RecipeError, match="has one place"):
        Combined(parts=(METHOD_OF["prefix"], METHOD_OF["llama_adapter"])).attach(exact_llama())


# PEFT's files


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("families")
    return {name: saved_folder(tmp, FAMILIES[name]) for name in ("llama", "qwen2", "qwen3", "smollm3", "gemma")}


def opened(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").requires_grad_(False).eval()
    attend_by_documents(model)
    return model


FILES = [(name, family) for name in METHOD_OF for family in ("llama", "qwen2", "qwen3", "smollm3", "gemma")]


@pytest.mark.parametrize(("name", "family"), FILES)
def test_peft_reads_what_is_written_to_the_same_logits(name, family, folders, tmp_path):
    method = METHOD_OF[name]
    ours = attached(method, opened(folders[family]))
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", ours, method, "org/base")
    assert (tmp_path / "adapter" / WEIGHTS).is_file()
    assert not (tmp_path / "adapter" / CONFIG).exists()
    if method.name == "llama_adapter" and family != "llama":
        assert not (tmp_path / "adapter" / PEFT).exists()  # of these families PEFT has none
        return
    theirs = peft.PeftModel.from_pretrained(opened(folders[family]), tmp_path / "adapter" / PEFT)
    ids, count = IDS % VOCAB, method.length if method.name == "prompt" else 0
    with torch.no_grad():
        want, plain = ours(input_ids=ids).logits, opened(folders[family])(input_ids=ids).logits
        found = theirs(input_ids=ids).logits[:, count:]
    assert (want - plain).abs().max() > 0.05
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in METHOD_OF if name != "prefix"])
def test_what_peft_has_in_its_file_is_read_back(name, folders, tmp_path):
    method = METHOD_OF[name]
    ours = attached(method, opened(folders["llama"]))
    want = {n: t.detach().clone() for n, t in saved_tensors(ours).items()}
    found = method.from_peft(ours, method.peft(ours)[1])
    assert found.keys() == want.keys()
    for key, tensor in want.items():
        torch.testing.assert_close(found[key].to(tensor.dtype), tensor, atol=1e-6, rtol=1e-5)


def test_a_prefix_that_peft_would_forget_in_a_sliding_window_is_not_written_for_it(tmp_path):
    for family in ("mistral", "gemma3", "cohere", "phi", "gpt_neox"):
        model = new_model(FAMILIES[family])
        attend_by_documents(model)
        method = METHOD_OF["prefix"]
        method.attach(model)
        assert method.peft(model) is None
    assert ADAPTER(length=5, first_block=1).peft(attached(ADAPTER(length=5, first_block=1), exact_llama())) is None
