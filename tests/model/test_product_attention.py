"""Attention by products is SDPA's, nearer to float32 than the flash kernel's, holds no T x T, and is taken where it is faster and alone there."""

import json

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from qlite.model import product_attention
from qlite.model.documents import attend_by_documents
from qlite.model.head import hidden_states
from qlite.model.product_attention import are_faster_here, attend_by_products, traced_for
from qlite.model.shapes import base_shapes
from qlite.recipe.schema import Memory
from qlite.training.forecast import worst_workload
from qlite.training.kept_plans import kept_forecast
from tests.model.watch import LAYERS, adapt, are_equal, distance, gradient, ids
from tests.tiny import tiny_llama
from tests.tiny_run import run, tiny_recipe

SCALE = 0.3


def drawn(batch: int, heads: int, tokens: int, size: int, dtype: torch.dtype = torch.float64, seed: int = 0, mean: float = 0.0) -> Tensor:
    """Return random [B, H, T, D] as projections give it: a view of [B, T, H * D]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, heads, size, generator=generator) + mean * torch.randn(1, 1, heads, size, generator=generator)
    return x.to(dtype).transpose(1, 2)


def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE).transpose(1, 2)


def passes(attend, qkv: list[Tensor]) -> list[Tensor]:
    """Return the output, and the gradients of query, key and value for one that weighs each place in its own way."""
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = attend(*qkv)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, qkv, weights)]


# Batch, query heads, key heads, tokens, a key's size, a value's. A tile is as high as a key is wide.
SIZES = [(2, 6, 3, 37, 8, 8), (1, 4, 4, 64, 16, 24), (3, 8, 2, 1, 8, 8), (2, 3, 1, 16, 16, 16), (1, 2, 2, 17, 16, 8), (2, 4, 2, 5, 8, 8)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_output_and_gradients_are_sdpas(sizes):
    batch, heads, groups, tokens, size, value_size = sizes
    qkv = [drawn(batch, heads, tokens, size), drawn(batch, groups, tokens, size, seed=1), drawn(batch, groups, tokens, value_size, seed=2)]
    products = passes(lambda *x: attend_by_products(*x, SCALE), qkv)
    for found, expected in zip(products, passes(by_sdpa, qkv), strict=True):
        # Gradients of keys and values are added up in float32.
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_in_bfloat16_it_is_nearer_to_float32_than_the_flash_kernel_where_keys_have_a_mean():
    qkv = [drawn(2, 4, 200, 32, torch.bfloat16), *(drawn(2, 2, 200, 32, torch.bfloat16, seed, mean=3.0) for seed in (1, 2))]
    exact = passes(by_sdpa, [x.float() for x in qkv])
    products, flash = (
        [((a.float() - b).norm() / b.norm()).item() for a, b in zip(passes(attend, qkv), exact, strict=True)]
        for attend in (lambda *x: attend_by_products(*x, SCALE), by_sdpa)
    )
    # The query's gradient is a sum over keys, whose mean adds up to nothing but the rounding of the shares.
    assert 0 < products[1] < 0.5 * flash[1]
    assert all(0 < one < 1.3 * other for one, other in zip(products, flash, strict=True))


class Largest(TorchDispatchMode):
    """Sees the most numbers that any new tensor has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_no_scores_of_all_queries_are_ever_there():
    heads, tokens, size = 2, 512, 8
    qkv = [drawn(1, heads, tokens, size, seed=seed) for seed in range(3)]
    with Largest() as seen:
        passes(lambda *x: attend_by_products(*x, SCALE), qkv)
    assert seen.numbers == heads * tokens * size


# Where it is taken


@pytest.fixture
def taken(monkeypatch) -> list[tuple[int, ...]]:
    """Lets products be taken on any CPU; the sizes of the queries that were, one after the other."""
    seen = []

    def attended(query: Tensor, *others):
        seen.append(tuple(query.shape))
        return attend_by_products(query, *others)

    monkeypatch.setattr(product_attention, "are_faster_here", lambda: True)
    monkeypatch.setattr(product_attention, "attend_by_products", attended)
    return seen


def model_of(checkpointing: str = "none", dtype: torch.dtype = torch.bfloat16, **sizes):
    model = tiny_llama("16 bit", dtype, num_hidden_layers=LAYERS, **sizes)
    attend_by_documents(model)
    return adapt(model, Memory(checkpointing=checkpointing))


def test_a_models_gradient_is_as_near_to_float32s_as_by_sdpa(taken, monkeypatch):
    _, exact = gradient(model_of(dtype=torch.float32))
    assert not taken
    _, found = gradient(model_of())
    assert len(taken) == LAYERS
    monkeypatch.setattr(product_attention, "are_faster_here", lambda: False)
    _, by_flash = gradient(model_of())
    assert len(taken) == LAYERS
    assert 0 < distance(found, exact) < 1.2 * distance(by_flash, exact)


@pytest.mark.parametrize("checkpointing", ["block", "attention"])
def test_the_bits_are_those_without_checkpointing(checkpointing, taken):
    loss, expected = gradient(model_of())
    found, gradients = gradient(model_of(checkpointing))
    assert torch.equal(found, loss)
    assert are_equal(gradients, expected)


@pytest.mark.parametrize(("checkpointing", "times"), [("none", 1), ("attention", 1), ("block", 2)])
def test_kept_it_is_computed_once(checkpointing, times, taken, monkeypatch):
    computed, compute = [], product_attention._attended
    monkeypatch.setattr(product_attention, "_attended", lambda *args: computed.append(1) or compute(*args))
    gradient(model_of(checkpointing))
    assert len(computed) == times * LAYERS


def test_each_document_of_a_packed_line_has_its_own(taken):
    positions = torch.cat([torch.arange(5), torch.arange(1), torch.arange(14)]).repeat(2, 1)
    model = model_of()
    packed = hidden_states(model, ids(), positions)
    assert [shape[2] for shape in taken] == [5, 14, 5, 14] * LAYERS  # one token alone has nothing to be multiplied for
    alone = hidden_states(model, ids()[:1, 6:])
    assert (packed[:1, 6:] - alone).abs().max() < 0.05 * alone.abs().max()


def test_what_it_does_not_know_is_left_to_sdpa(taken):
    model = model_of(attention_dropout=0.1)
    gradient(model)
    assert not taken  # it draws
    model.eval()
    with torch.no_grad():
        answer = model(ids(1, 6), use_cache=True)
        assert len(taken) == LAYERS  # a prompt
        model(ids(1, 1), past_key_values=answer.past_key_values, use_cache=True)
        model(ids(1, 3), past_key_values=answer.past_key_values, use_cache=True)
        assert len(taken) == LAYERS  # tokens after it
        model(ids(2, 6), attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]))
        assert len(taken) == LAYERS  # padding on the left
    assert model(ids(2, 6), position_ids=torch.arange(6).expand(2, -1)).logits.isfinite().all()
    assert len(taken) == 2 * LAYERS


@pytest.mark.parametrize("keys", [{}, {"mlp_chunk": 16, "checkpointing": "block"}], ids=["plain", "MLPs in tiles"])
def test_a_run_by_products_is_planned_with_them(keys, taken, tmp_path):
    recipe = tiny_recipe(tmp_path, base={"dtype": "bfloat16"}, memory={"plan": "tell", "loss_chunk": 8, **keys})
    run(recipe)
    assert taken
    record = json.loads((tmp_path / "run" / "memory.json").read_text())
    planned, measured = record["planned"]["phases"]["training"]["bytes"], record["measured"]["training"]["bytes"]
    assert abs(planned - measured) <= max(0.01 * measured, 2100)  # bitsandbytes' code tables of 2 KiB are made once a process


def test_a_plan_for_a_card_has_none(taken, tmp_path):
    recipe = tiny_recipe(tmp_path, base={"dtype": "bfloat16"})
    shapes = base_shapes(recipe.base, lambda *_: None)

    def planned() -> dict:
        return kept_forecast(recipe, shapes, worst_workload(recipe)).as_record()

    for_card = planned()
    with traced_for(torch.device("cuda")):
        assert planned() == for_card
    assert not taken
    with traced_for(torch.device("cpu")):
        assert planned()["work"] != for_card["work"]
    assert taken


def test_where_it_is_faster_is_asked_of_the_processor(monkeypatch):
    for instructions, tiles in ((True, False), (True, True), (False, False)):
        are_faster_here.cache_clear()
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=instructions: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=tiles: has)
        assert are_faster_here() == (instructions and not tiles)
    are_faster_here.cache_clear()
