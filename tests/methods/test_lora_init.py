"""PiSSA and LoftQ: what the factors begin with, what is frozen under them, and every place where the original weights meet them."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

from qlite.errors import RecipeError
from qlite.formats.merged import merged_tensors
from qlite.formats.peft import CONFIG, PEFT, adapter_tensors, copy_adapter, write_adapter
from qlite.methods.base import adapted_linears, adapters_off, trainable_tensors
from qlite.methods.lora import LoRA
from qlite.methods.lora_init import principal
from qlite.quant.linear import dense_weight
from qlite.serving.survival import survival
from tests.tiny import tiny_llama

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
ORIGINAL = {f"{n}.weight": module.weight.data for n, module in tiny_llama().named_modules() if isinstance(module, nn.Linear)}


class Files:
    """The original weights, as qlite.model.originals hands them out."""

    def __contains__(self, name: str) -> bool:
        return name in ORIGINAL

    def parts(self, name: str):
        return iter([ORIGINAL[name].clone()])


def original(name: str) -> torch.Tensor:
    return ORIGINAL[f"{name}.weight"].clone()


def begun(storage: str = "4 bit", moved: float = 0.0, **keys) -> nn.Module:
    model, method = tiny_llama(storage), LoRA(**{"rank": 4, "alpha": 6.0, **keys})
    method.attach(model)
    method.start(model, original)
    generator = torch.Generator().manual_seed(3)
    for p in trainable_tensors(model).values():
        p.data += moved * torch.randn(p.shape, generator=generator)
    return model.eval()


def errors(model: nn.Module) -> dict[str, float]:
    return {n: float((ORIGINAL[f"{n}.weight"] - m.merged(dense_weight(m.frozen))).norm()) for n, m in adapted_linears(model)}


def test_the_factors_are_the_largest_singular_directions_as_pefts_pissa_has_them():
    weight = original("model.layers.0.mlp.up_proj")
    layer = begun("16 bit", init="pissa").get_submodule("model.layers.0.mlp.up_proj")
    U, sigma, V = torch.linalg.svd(weight, full_matrices=False)
    best = U[:, :4] * sigma[:4] @ V[:4]
    got = layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    assert (weight - got).norm() <= 1.006 * (weight - best).norm()
    torch.testing.assert_close(layer.base.weight, weight - got, atol=1e-6, rtol=0)
    # Both factors have the singular values' roots: A A^T = B^T B, diagonal.
    torch.testing.assert_close(layer.lora_A.weight @ layer.lora_A.weight.T, layer.lora_B.weight.T @ layer.lora_B.weight, atol=1e-5, rtol=0)


def test_the_quick_svd_is_as_good_as_the_exact_one_also_for_quantisation_errors():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 320, generator=generator)
    linear = tiny_llama("4 bit").get_submodule("model.layers.0.mlp.up_proj").storage.make(320, 200, False, torch.float32, "cpu")
    linear.store(weight)
    for matrix in (weight, weight - linear.dense(torch.float32)):
        for rank in (4, 16, 64):
            A, B = principal(matrix, rank, 2.0)
            best = torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt()
            assert best * 0.9999 <= (matrix - 2 * B @ A).norm() <= 1.006 * best


def test_a_matrix_of_a_smaller_rank_than_asked_for_has_factors_without_holes():
    for matrix in (torch.zeros(30, 20), torch.ones(20, 30)):
        A, B = principal(matrix, 4, 2.0)
        assert A.isfinite().all()
        assert B.isfinite().all()
        torch.testing.assert_close(2 * B @ A, matrix, atol=1e-5, rtol=0)


@pytest.mark.parametrize("keys", [{"init": "pissa"}, {"init": "loftq"}, {"init": "loftq", "loftq_rounds": 5}], ids=str)
@pytest.mark.parametrize("storage", ["4 bit", "8 bit"])
def test_every_linear_begins_nearer_to_its_original_than_its_quantised_weight_is(storage, keys):
    """arXiv:2404.02948, section 4: ||W - (q(W - AB) + AB)|| against ||W - q(W)||."""
    plain, found = errors(begun(storage)), errors(begun(storage, **keys))
    assert len(found) == 14
    assert all(found[name] < plain[name] for name in plain)


def test_loftq_in_one_round_leaves_the_base_as_it_is_and_has_the_best_factors():
    model, base = begun(init="loftq"), tiny_llama("4 bit")
    for name, layer in adapted_linears(model):
        frozen = dense_weight(base.get_submodule(name))
        assert torch.equal(dense_weight(layer.base), frozen)
        best = torch.linalg.svdvals(original(name) - frozen)[4:].square().sum().sqrt()
        assert (original(name) - layer.merged(frozen)).norm() <= 1.006 * best
    with torch.no_grad(), adapters_off(model):
        assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)


def test_loftqs_rounds_are_the_algorithms():
    """arXiv:2310.08659, algorithm 1, written down again with an exact SVD; quantising is a step function, so most codes are the same."""
    layer = begun(init="loftq", loftq_rounds=3).get_submodule("model.layers.0.mlp.up_proj")
    weight, stored = original("model.layers.0.mlp.up_proj"), layer.base.storage.make(64, 128, False, torch.float32, "cpu")
    low = torch.zeros_like(weight)
    for _ in range(3):
        stored.store(weight - low)
        U, sigma, V = torch.linalg.svd(weight - stored.dense(torch.float32), full_matrices=False)
        low = U[:, :4] * sigma[:4] @ V[:4]
    want = (weight - stored.dense(torch.float32) - low).norm()
    got = (weight - layer.merged(dense_weight(layer.base))).norm()
    assert abs(got - want) < 0.02 * want


@pytest.mark.parametrize("keys", [{"init": "pissa"}, {"init": "loftq"}, {"init": "loftq", "loftq_rounds": 3}], ids=str)
def test_what_is_loaded_makes_the_frozen_weights_again_bit_for_bit(keys, tmp_path):
    """As generate and export do it: attach, load, settle; nothing starts."""
    model, method = begun(moved=0.05, **keys), LoRA(rank=4, alpha=6.0, **keys)
    saved = {n: t.detach().clone() for n, t in adapter_tensors(model).items()}
    other = tiny_llama("4 bit")
    method.attach(other)
    copy_adapter(saved, other, tmp_path)
    method.settle(other, original)
    assert torch.equal(other.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)
    method.settle(other, original)  # again: the residual is of the original, not of what lies there
    assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("keys", [{"init": "pissa"}, {"init": "loftq"}, {"init": "loftq", "loftq_rounds": 3}], ids=str)
def test_merged_over_the_original_it_is_the_original_with_what_was_learned(keys):
    model = begun(moved=0.05, **keys)
    merged = {tensor.name: tensor.whole() for tensor in merged_tensors(model, Files())}
    for name, layer in adapted_linears(model):
        now, then = ((B.float() @ A.float()) * layer.scaling for A, B in _factors(layer))
        torch.testing.assert_close(merged[f"{name}.weight"], original(name) + now - then, atol=1e-6, rtol=0)
        over_stored = layer.merged(dense_weight(layer.frozen))
        torch.testing.assert_close(over_stored, dense_weight(layer.frozen) + now, atol=1e-6, rtol=0)


def _factors(layer):
    return (layer.lora_A.weight, layer.lora_B.weight), (layer.start_A, layer.start_B)


def test_what_training_changed_is_told_from_what_it_began_with():
    """Else what was taken out of the weight would count as learned, and what rounding leaves of it would look like a good export."""
    for files in (None, Files()):
        for moved in (0.0, 0.05):
            found = survival(begun(moved=moved, init="pissa"), files, lambda dense: [dense.whole()], lambda *_: None)
            changes = [each.change for each in found.values()]
            assert (max(changes) < 1e-9) if not moved else (min(changes) > 1e-3)


@pytest.mark.parametrize("keys", [{"init": "pissa"}, {"init": "loftq", "loftq_rounds": 3}], ids=str)
def test_switched_off_it_answers_nearer_to_the_original_than_the_quantised_base_does(keys):
    files, base = tiny_llama()(input_ids=IDS).logits, tiny_llama("4 bit")(input_ids=IDS).logits
    model = begun(moved=0.05, **keys)
    on = model(input_ids=IDS).logits
    with torch.no_grad(), adapters_off(model):
        off = model(input_ids=IDS).logits
    assert (off - files).norm() < (base - files).norm()
    assert (on - files).norm() > 2 * (off - files).norm()
    assert torch.equal(model(input_ids=IDS).logits, on)


def test_switched_off_over_16_bit_it_is_the_base_to_rounding():
    model = begun("16 bit", moved=0.05, init="pissa")
    with torch.no_grad(), adapters_off(model):
        torch.testing.assert_close(model(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "keys", [{"init": "pissa", "rslora": True}, {"init": "loftq", "rank_per_target": {"q_proj": 2}}], ids=["pissa", "loftq"]
)
def test_peft_reads_it_as_a_lora_of_twice_the_rank_over_the_original(keys, tmp_path):
    model, method = begun(moved=0.05, modules_to_save=("norm",), **keys), LoRA(rank=4, alpha=6.0, modules_to_save=("norm",), **keys)
    write_adapter(tmp_path, model, method, "base")
    assert not (tmp_path / CONFIG).exists()  # no other program is to take qlite's own file for a LoRA
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / PEFT).eval()
    ours = tiny_llama()
    ours.load_state_dict({tensor.name: tensor.whole() for tensor in merged_tensors(model, Files())}, strict=False)
    torch.testing.assert_close(theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits, atol=2e-5, rtol=1e-4)
    config = json.loads((tmp_path / PEFT / CONFIG).read_text())
    assert set(config["rank_pattern"].values()) | {config["r"]} == ({8} if "rslora" in keys else {8, 4})


def test_peft_begins_pissa_with_the_same_weights():
    """PEFT 0.21, tuners/lora/layer.py, pissa_init: exact SVD, float32. In the weight four directions stand out."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    weight += 0.1 * torch.randn(128, 64, generator=generator)
    peft_model, model, name = tiny_llama(), tiny_llama(), "model.layers.0.mlp.up_proj"
    for each in (peft_model, model):
        each.get_submodule(name).weight.data.copy_(weight)
    config = LoraConfig(r=4, lora_alpha=6.0, target_modules=["up_proj"], init_lora_weights="pissa")
    theirs = PeftModel(peft_model, config).get_submodule(f"base_model.model.{name}")
    method = LoRA(rank=4, alpha=6.0, init="pissa", targets=("*.0.mlp.up_proj",))
    method.attach(model)
    method.start(model, lambda _: weight)
    ours = model.get_submodule(name)
    torch.testing.assert_close(ours.base.weight, theirs.base_layer.weight, atol=1e-4, rtol=0)
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    torch.testing.assert_close(ours.lora_B.weight @ ours.lora_A.weight, product, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("storage", "keys", "told"),
    [
        ("16 bit", {"init": "loftq"}, r'method.init = "loftq": base.bits = 16, where nothing is quantised.*"pissa"'),
        ("4 bit", {"init": "pissa", "dora": True}, r'method.init = "pissa": DoRA.*method.dora = false'),
        ("4 bit", {"loftq_rounds": 2}, r'method.loftq_rounds = 2: counts with method.init = "loftq" alone'),
        ("4 bit", {"init": "loftq", "targets": ("q_proj", "lm_head")}, r'method.init = "loftq": lm_head is held in 16 bit'),
    ],
)
def test_what_cannot_begin_so_is_refused_with_key_and_way_out(storage, keys, told):
    with pytest.raises(RecipeError, match=told):
        LoRA(rank=4, **keys).attach(tiny_llama(storage))


def test_a_head_that_is_the_embedding_is_not_taken_apart():
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(RecipeError, match=r'"pissa": lm_head is the embedding.*method.targets'):
        LoRA(rank=4, init="pissa", targets=("lm_head",)).attach(model)


def test_the_file_says_what_it_began_with(tmp_path):
    write_adapter(tmp_path, begun(init="pissa"), LoRA(rank=4, init="pissa"), "base")
    names = {name.rpartition("q_proj.")[2] for name in load_file(tmp_path / "adapter_model.safetensors") if "q_proj" in name}
    assert names == {"lora_A.weight", "lora_B.weight", "start_A", "start_B"}
