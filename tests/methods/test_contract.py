"""Laws every method must obey, over every storage, whatever the method is. A new method is done when it passes these."""

import dataclasses
from collections.abc import Collection
from functools import partial

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from qlite.errors import NotMergeable, QliteError
from qlite.formats.merged import merged_tensors
from qlite.formats.peft import adapter_tensors, copy_adapter
from qlite.methods import METHODS, Combined
from qlite.methods.base import saved_tensors, trainable_tensors
from qlite.model.checkpointing import checkpoint_blocks
from qlite.model.documents import attend_by_documents
from qlite.model.head import hidden_states
from qlite.optim.build import Optimizer
from qlite.quant.linear import dense_weight
from qlite.recipe.read import build_recipe
from qlite.recipe.schema import Recipe
from qlite.recipe.write import recipe_tables
from qlite.training.step import Stepper
from tests.marks import slow
from tests.tiny import STORAGES, one_batch, tiny_llama

# Every method a recipe can name, as itself and with the options that change its mathematics.
VARIANTS = {
    "lora": METHODS["lora"](rank=4),
    "lora, rslora": METHODS["lora"](rank=4, rslora=True),
    "lora, plus": METHODS["lora"](rank=4, b_lr_ratio=16.0),
    "lora, dora": METHODS["lora"](rank=4, dora=True),
    "lora, ranks": METHODS["lora"](rank=4, targets=("q_proj", "*.mlp.*"), rank_per_target={"q_proj": 2}),
    "lora, alphas": METHODS["lora"](rank=4, alpha_per_target={"q_proj": 4.0, "*.1.*": 1.5}),
    "lora, whole layers": METHODS["lora"](rank=4, modules_to_save=("lm_head", "embed_tokens", "*.0.input_layernorm")),
    "lora, pissa": METHODS["lora"](rank=4, init="pissa", targets=("q_proj", "k_proj", "v_proj", "*.mlp.*")),
    "lora, loftq": METHODS["lora"](rank=4, init="loftq"),
    "lora, loftq in rounds": METHODS["lora"](rank=4, init="loftq", loftq_rounds=3),
    # Tokens that the rows below have before a trained one: those of others get no gradient in the embedding.
    "lora, token rows": METHODS["lora"](rank=4, trained_tokens=(6, 12, 53)),
    "ia3": METHODS["ia3"](),
    "ia3, all linears": METHODS["ia3"](targets="all-linear", feedforward=("*.1.mlp.*",)),
    "bottleneck": METHODS["bottleneck"](width=8),
    "bottleneck, pfeiffer": METHODS["bottleneck"](width=8, placement="pfeiffer", activation="silu"),
    "full": METHODS["full"](),
    # Of a period of three steps the second checkpoint of the laws below is in the middle.
    "galore": METHODS["galore"](rank=4, update_every=3),
    "galore, some linears": METHODS["galore"](rank=8, update_every=1, targets=("q_proj", "*.mlp.*")),
    "lora + ia3": Combined(parts=(METHODS["lora"](rank=4), METHODS["ia3"]())),
    "lora + bottleneck": Combined(parts=(METHODS["bottleneck"](width=8), METHODS["lora"](rank=4, dora=True))),
    "ia3 + lora + bottleneck": Combined(parts=(METHODS["ia3"](), METHODS["lora"](rank=4), METHODS["bottleneck"](width=8))),
    "lora + prefix": Combined(parts=(METHODS["lora"](rank=4), METHODS["prefix"](length=3, hidden=8))),
    "lora + prompt": Combined(parts=(METHODS["lora"](rank=4), METHODS["prompt"](length=3))),
    "lora + llama_adapter": Combined(parts=(METHODS["lora"](rank=4), METHODS["llama_adapter"](length=3, first_block=1))),
    # So that of the 4 steps below the second masks, and the third, after a stop, too.
    "adalora": METHODS["adalora"](rank=2, start_rank=4, interval=1, start_share=0.25, final_share=0.25),
    "relora": METHODS["relora"](rank=4, resets=1, warmup=1),
    "low_rank, svd": METHODS["low_rank"](rank=8),
    "low_rank, autoencoder": METHODS["low_rank"](rank=8, init="autoencoder"),
    "low_rank, lora": METHODS["low_rank"](rank=8, init="lora", targets=("v_proj", "gate_proj")),
    "prefix": METHODS["prefix"](length=3, hidden=8),
    "prefix, no MLP": METHODS["prefix"](length=3, hidden=0),
    "prompt": METHODS["prompt"](length=3),
    "prompt, text": METHODS["prompt"](length=3, text=(6, 12)),
    "llama_adapter": METHODS["llama_adapter"](length=3, first_block=1),
    "llama_adapter, one gate": METHODS["llama_adapter"](length=3, first_block=0, gate="block"),
    "llama_adapter_v2": METHODS["llama_adapter_v2"](length=3, first_block=1),
}
# Methods whose mathematics needs the weights themselves, by the reason that they give for refusing a packed base.
UNPACKED_ONLY: dict[str, str] = dict.fromkeys(("full", "galore"), "trains the weights themselves")
# Variants that begin with what quantising takes away, by the reason that they give for refusing a base that is not quantised.
PACKED_ONLY = dict.fromkeys(("lora, loftq", "lora, loftq in rounds"), "nothing is quantised, so there is no error to begin with")
# Variants that start nearer to the model in the base's files than its quantised weights are.
START_NEARER = {"lora, pissa", *PACKED_ONLY}
# Variants that freeze another weight than the base's: switched off they answer nearly as it does, and nearer to its files.
MOVED_BASE = {"lora, pissa", "lora, loftq in rounds"}
# Methods that promise no start as the base model.
START_ELSEWHERE: set[str] = {"low_rank", "prefix", "prompt"}
# Methods that train the model's own tensors, so there is no base to go back to.
NO_WAY_BACK: set[str] = {"full", "galore"}
# Methods that are no change of the base's weights, so no merged model is equal to the adapted one.
UNMERGEABLE: set[str] = {"bottleneck", "prefix", "prompt", "llama_adapter", "llama_adapter_v2"}
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))

# What differs from another variant by its keys alone.
LATER = {
    *(
        "lora, plus",
        "lora, rslora",
        "lora, alphas",
        "lora, loftq in rounds",
        "ia3, all linears",
        "bottleneck, pfeiffer",
        "galore, some linears",
    ),
    *("ia3 + lora + bottleneck", "low_rank, autoencoder", "low_rank, lora", "prefix, no MLP", "prompt, text", "llama_adapter, one gate"),
}
variants = pytest.mark.parametrize("name", [slow(name) if name in LATER else name for name in VARIANTS])
storages = pytest.mark.parametrize("storage", [slow(storage) if storage == "8 bit" else storage for storage in STORAGES])


def adapted(name: str, storage: str = "16 bit", moved: bool = True) -> nn.Module:
    """Return a tiny model with the method attached, its tensors moved off their start unless told otherwise."""
    method = VARIANTS[name]
    if storage == "16 bit" and name in PACKED_ONLY:
        pytest.skip(PACKED_ONLY[name])
    model = tiny_llama(storage)
    for part in method.each:
        if storage != "16 bit" and part.name in UNPACKED_ONLY:
            with pytest.raises(QliteError, match=UNPACKED_ONLY[part.name]):
                method.attach(model)
            pytest.skip(UNPACKED_ONLY[part.name])
    attend_by_documents(model)
    weights = {n: dense_weight(module) for n, module in tiny_llama().named_modules() if isinstance(module, nn.Linear)}
    method.attach(model)
    method.start(model, weights.__getitem__)
    if moved:
        generator = torch.Generator().manual_seed(3)
        for p in trainable_tensors(model).values():
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def loss_of(model: nn.Module) -> torch.Tensor:
    logits = model(input_ids=IDS).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def test_every_method_of_a_recipe_is_under_the_contract():
    assert {part.name for variant in VARIANTS.values() for part in variant.each} == set(METHODS)


def is_any(name: str, names: Collection[str]) -> bool:
    """Return whether a part of the variant ``name`` is one of the methods ``names``."""
    return any(part.name in names for part in VARIANTS[name].each)


@storages
@variants
def test_it_starts_as_the_base_model(name, storage):
    if is_any(name, START_ELSEWHERE):
        pytest.skip("starts from prompts or matrices of its own")
    want = tiny_llama(storage)(input_ids=IDS).logits
    if name in START_NEARER and storage != "16 bit":
        files, start = tiny_llama()(input_ids=IDS).logits, adapted(name, storage, moved=False)(input_ids=IDS).logits
        assert (start - files).norm() < (want - files).norm()
        return
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
    for kept in ("everything", "inputs", "attention"):
        model = adapted(name, storage).train()
        if kept != "everything":
            checkpoint_blocks(model, keep_attention=kept == "attention")
        loss_of(model).backward()
        grads.append({n: p.grad for n, p in trainable_tensors(model).items()})
    for key, grad in grads[0].items():
        assert torch.equal(grad, grads[1][key]), key
        assert torch.equal(grad, grads[2][key]), key


@storages
@variants
def test_the_merged_model_equals_the_adapted_one(name, storage):
    model = adapted(name, storage)
    want = model(input_ids=IDS).logits
    assert VARIANTS[name].is_mergeable == (not is_any(name, UNMERGEABLE))
    if is_any(name, UNMERGEABLE):
        with pytest.raises(NotMergeable, match=r"no weight of the base model$|no change of a weight, so there is nothing to merge$"):
            list(merged_tensors(model))
        return
    tensors = {tensor.name: tensor.whole() for tensor in merged_tensors(model)}
    plain = tiny_llama()
    plain.load_state_dict(tensors, strict=False)
    assert set(tensors) >= set(plain.state_dict()) - {"lm_head.weight"}
    model = plain
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
def test_documents_packed_into_a_line_are_what_each_is_alone(name, storage):
    model = adapted(name, storage)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1, 2]])
    packed = hidden_states(model, IDS, positions)
    for row, cut in ((0, 4), (1, 6)):
        for part in (slice(0, cut), slice(cut, None)):
            alone = hidden_states(model, IDS[row : row + 1, part])
            torch.testing.assert_close(packed[row : row + 1, part], alone, atol=1e-5, rtol=1e-4)


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
    real, ghost = adapted(name, storage), tiny_llama(storage).to("meta")
    attend_by_documents(ghost)
    VARIANTS[name].attach(ghost)
    facts = [{n: (p.shape, p.dtype) for n, p in trainable_tensors(m).items()} for m in (ghost, real)]
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
    assert same - set(saved_tensors(model, resumable=True)) == set(everything) - set(saved_tensors(model, resumable=True))
    assert not same & set(trained)


@storages
@variants
def test_stopped_and_gone_on_with_it_ends_with_the_same_bits(name, storage, tmp_path):
    method, batch = VARIANTS[name], one_batch()

    def trained(model: nn.Module, steps: range, saved: tuple | None = None) -> tuple:
        optimizer = Optimizer(name="adamw8bit", lr=1e-2).build(method.param_groups(model, 1e-2), torch.device("cpu"), lambda _: None)
        if saved is not None:
            copy_adapter(saved[0], model, tmp_path, resumable=True)
            optimizer.load_state(*saved[1])
            method.settle(model, weights.__getitem__)
        stepper = Stepper(model, method, 4, torch.device("cpu"))
        for step in steps:
            hooked = (model, optimizer, step, 4)
            stepper.before_update = partial(method.before_step, *hooked)
            optimizer.set_lr_factor(method.lr_factor(step, 4))
            stepper.step([batch], optimizer, clip_norm=1.0, seed=(0, step))
            method.after_step(*hooked)
        tensors, numbers = optimizer.state()
        return {n: t.detach().clone() for n, t in adapter_tensors(model, resumable=True).items()}, (
            {n: t.clone() for n, t in tensors.items()},
            dict(numbers),
        )

    weights = {n: dense_weight(module) for n, module in tiny_llama().named_modules() if isinstance(module, nn.Linear)}
    straight = trained(adapted(name, storage), range(1, 5))
    resumed = trained(adapted(name, storage), range(3, 5), trained(adapted(name, storage), range(1, 3)))
    assert straight[0].keys() == resumed[0].keys()
    assert [n for n, t in straight[0].items() if not torch.equal(t, resumed[0][n])] == []
    assert [n for n, t in straight[1][0].items() if not torch.equal(t, resumed[1][0][n])] == []


@storages
@variants
def test_saved_and_loaded_it_is_the_same_bit_for_bit(name, storage, tmp_path):
    model = adapted(name, storage)
    saved = {n: t.detach().clone() for n, t in adapter_tensors(model).items()}
    other = adapted(name, storage, moved=False)
    copy_adapter(saved, other, tmp_path)
    weights = {n: dense_weight(module) for n, module in tiny_llama().named_modules() if isinstance(module, nn.Linear)}
    VARIANTS[name].settle(other, weights.__getitem__)
    assert all(torch.equal(t, saved[n]) for n, t in adapter_tensors(other).items())
    assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)


@variants
def test_its_fields_go_through_a_recipe_and_back(name):
    tables = {"base": {"model": "x", "bits": 16 if is_any(name, UNPACKED_ONLY) else 4}, "data": {"train": "x.jsonl"}, "train": {"steps": 1}}
    recipe: Recipe = dataclasses.replace(build_recipe(tables, "test"), method=VARIANTS[name])
    assert build_recipe(recipe_tables(recipe), "test") == recipe
