"""Laws every method must obey, over every storage, whatever the method is. A new method is done when it passes these."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from qlite.errors import NotMergeable
from qlite.formats.peft import adapter_tensors, copy_adapter
from qlite.methods import METHODS
from qlite.methods.base import adapted_linears, trainable_tensors
from qlite.model.checkpointing import checkpoint_blocks
from qlite.optim.build import Optimizer
from qlite.quant.linear import dense_weight
from qlite.recipe.read import build_recipe
from qlite.recipe.schema import Recipe
from qlite.recipe.write import recipe_tables
from qlite.training.step import Stepper
from tests.tiny import STORAGES, one_batch, tiny_llama

# Every method a recipe can name, as itself and with the options that change its mathematics.
VARIANTS = {
    "lora": METHODS["lora"](rank=4),
    "lora, rslora": METHODS["lora"](rank=4, rslora=True),
    "lora, dora": METHODS["lora"](rank=4, dora=True),
    "lora, ranks": METHODS["lora"](rank=4, targets=("q_proj", "*.mlp.*"), rank_per_target={"q_proj": 2}),
    "lora, alphas": METHODS["lora"](rank=4, alpha_per_target={"q_proj": 4.0, "*.1.*": 1.5}),
    "lora, whole layers": METHODS["lora"](rank=4, modules_to_save=("lm_head", "embed_tokens", "*.0.input_layernorm")),
    # Tokens that the rows below have before a trained one: those of others get no gradient in the embedding.
    "lora, token rows": METHODS["lora"](rank=4, trained_tokens=(6, 12, 53)),
}
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))

variants = pytest.mark.parametrize("name", VARIANTS)
storages = pytest.mark.parametrize("storage", STORAGES)


def adapted(name: str, storage: str = "16 bit", moved: bool = True) -> nn.Module:
    """Return a tiny model with the method attached, its tensors moved off their start unless told otherwise."""
    model = tiny_llama(storage)
    VARIANTS[name].attach(model)
    if moved:
        generator = torch.Generator().manual_seed(3)
        for p in trainable_tensors(model).values():
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def loss_of(model: nn.Module) -> torch.Tensor:
    logits = model(input_ids=IDS).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def test_every_method_of_a_recipe_is_under_the_contract():
    assert {variant.name for variant in VARIANTS.values()} == set(METHODS)


@storages
@variants
def test_it_starts_as_the_base_model(name, storage):
    want = tiny_llama(storage)(input_ids=IDS).logits
    torch.testing.assert_close(adapted(name, storage, moved=False)(input_ids=IDS).logits, want, atol=1e-6, rtol=1e-5)


@storages
@variants
def test_every_trainable_tensor_gets_a_gradient_also_after_an_eval_pass(name, storage):
    model = adapted(name, storage)
    model.eval()
    with torch.no_grad():
        loss_of(model)
    model.train()
    loss_of(model).backward()
    tensors = trainable_tensors(model)
    assert tensors
    assert [n for n, p in tensors.items() if p.grad is None or not p.grad.abs().sum() > 0] == []


@storages
@variants
def test_checkpointing_changes_no_gradient(name, storage):
    grads = []
    for on in (False, True):
        model = adapted(name, storage).train()
        if on:
            checkpoint_blocks(model)
        loss_of(model).backward()
        grads.append({n: p.grad for n, p in trainable_tensors(model).items()})
    for key, grad in grads[0].items():
        assert torch.equal(grad, grads[1][key]), key


@storages
@variants
def test_the_merged_model_equals_the_adapted_one(name, storage):
    model = adapted(name, storage)
    want = model(input_ids=IDS).logits
    try:
        merged = {n: a.merged_weight(dense_weight(a.base)) for n, a in adapted_linears(model)}
    except NotMergeable:
        assert not list(adapted_linears(model))
        return
    assert merged
    for n, weight in merged.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        parent, _, leaf = n.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
    torch.testing.assert_close(model(input_ids=IDS).logits, want, atol=1e-5, rtol=1e-4)


@storages
@variants
def test_left_padding_never_reaches_a_real_token(name, storage):
    # On the left: on the right a causal model could not see the padding anyway, and the law would prove nothing.
    model = adapted(name, storage)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :3], mask[1, :3] = 5, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[1, 3:]
    alone = model(input_ids=ids[1:, 3:]).logits[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


@storages
@variants
def test_the_future_never_reaches_the_past(name, storage):
    model = adapted(name, storage)
    other = IDS.clone()
    other[:, 5:] = 7
    torch.testing.assert_close(model(input_ids=other).logits[:, :5], model(input_ids=IDS).logits[:, :5])


@storages
@variants
def test_cached_decoding_equals_one_full_pass(name, storage):
    model = adapted(name, storage).eval()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        cache = DynamicCache(config=model.config)
        got = [model(input_ids=IDS[:, :5], past_key_values=cache, use_cache=True).logits]
        for i in range(5, IDS.shape[1]):
            got.append(model(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-4)


@storages
@variants
def test_attaching_on_meta_makes_the_names_and_shapes_of_a_real_attach(name, storage):
    ghost = tiny_llama(storage).to("meta")
    VARIANTS[name].attach(ghost)
    facts = [{n: (p.shape, p.dtype) for n, p in trainable_tensors(m).items()} for m in (ghost, adapted(name, storage))]
    assert facts[0] == facts[1]
    assert all(p.device.type == "meta" for p in ghost.parameters())


@storages
@variants
def test_a_step_moves_every_trainable_tensor_and_no_other(name, storage):
    model = adapted(name, storage)
    everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {n: t.detach().clone() for n, t in everything.items()}
    optimizer = Optimizer(name="torch_adamw", lr=1e-2).build(VARIANTS[name].param_groups(model, 1e-2), torch.device("cpu"))
    Stepper(model, VARIANTS[name], 4, torch.device("cpu")).step([one_batch()], optimizer, clip_norm=1.0)
    trained = trainable_tensors(model)
    same = {n for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items() if torch.equal(t, before[n])}
    assert same == set(everything) - set(trained)


@storages
@variants
def test_saved_and_loaded_it_is_the_same_bit_for_bit(name, storage, tmp_path):
    model = adapted(name, storage)
    saved = {n: t.detach().clone() for n, t in adapter_tensors(model).items()}
    other = adapted(name, storage, moved=False)
    copy_adapter(saved, other, tmp_path)
    assert all(torch.equal(t, saved[n]) for n, t in adapter_tensors(other).items())
    assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)


@variants
def test_its_fields_go_through_a_recipe_and_back(name):
    tables = {"base": {"model": "x"}, "data": {"train": "x.jsonl"}, "train": {"steps": 1}}
    recipe: Recipe = dataclasses.replace(build_recipe(tables, "test"), method=VARIANTS[name])
    assert build_recipe(recipe_tables(recipe), "test") == recipe
