"""Attention by products is SDPA's, changes no token by later ones, holds no T x T, and is taken, and planned, where it is faster."""

import json

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from qlite.errors import MachineError
from qlite.model import product_attention
from qlite.model.documents import attend_by_documents, documents_attention
from qlite.model.head import hidden_states
from qlite.model.product_attention import are_faster_here, are_traced, attend_by_products, traced_for
from qlite.model.shapes import base_shapes
from qlite.recipe.schema import Memory
from qlite.training import budget, planning
from qlite.training.forecast import worst_workload
from qlite.training.kept_plans import kept_forecast
from qlite.training.planning import Planner
from qlite.training.run_folder import RunFolder
from tests.model.watch import LAYERS, adapt, are_equal, distance, gradient, ids
from tests.tiny import tiny_llama
from tests.tiny_run import Watcher, run, tiny_recipe

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


def errors(attend, mean: float) -> list[float]:
    """Return how far output and gradients in bfloat16 are from float32's, relative, where keys have a mean of that size."""
    qkv = [drawn(2, 4, 200, 64, torch.bfloat16), *(drawn(2, 2, 200, 64, torch.bfloat16, seed, mean) for seed in (1, 2))]
    exact = passes(by_sdpa, [x.float() for x in qkv])
    return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(passes(attend, qkv), exact, strict=True)]


def test_in_bfloat16_what_keys_have_in_common_costs_no_digits():
    def attend(*qkv):
        return attend_by_products(*qkv, SCALE)

    plain, found, flash = errors(attend, 0.0), errors(attend, 10.0), errors(by_sdpa, 10.0)
    assert all(0 < one < 1.5 * other for one, other in zip(found, plain, strict=True))
    assert found[1] < 0.3 * flash[1]  # the queries' gradient, a sum of keys


def test_no_token_is_changed_by_later_ones():
    q, k, v = (drawn(1, 2, 100, 16, torch.bfloat16, seed) for seed in range(3))
    before = attend_by_products(q, k, v, SCALE)
    for worth in (7.0, float("inf"), float("nan")):
        k[:, :, 90:] = worth
        assert torch.equal(attend_by_products(q, k, v, SCALE)[:, :90], before[:, :90])


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


class Taken(list):
    """The lengths that products were taken for, one after the other."""

    in_plans = 0
    """How many of them without values."""


@pytest.fixture
def taken(monkeypatch) -> Taken:
    """Lets products be taken on any CPU and for models as small as a test's."""
    seen = Taken()

    def attended(query: Tensor, *others):
        seen.append(query.shape[2])
        seen.in_plans += isinstance(query, FakeTensor)
        return attend_by_products(query, *others)

    monkeypatch.setattr(product_attention, "are_faster_here", lambda: True)
    monkeypatch.setattr(product_attention, "LENGTHS", range(2, 2049))
    monkeypatch.setattr(product_attention, "LEAST_HEAD", 8)
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
    assert taken == [5, 14, 5, 14] * LAYERS  # one token alone has nothing to be multiplied for
    alone = hidden_states(model, ids()[:1, 6:])
    assert (packed[:1, 6:] - alone).abs().max() < 0.05 * alone.abs().max()


def test_what_it_does_not_know_is_left_to_sdpa(taken):
    gradient(model_of(attention_dropout=0.1))
    assert not taken  # it draws
    model = model_of()
    prompt = model(ids(1, 6), use_cache=True)
    assert len(taken) == LAYERS
    model(ids(1, 1), past_key_values=prompt.past_key_values, use_cache=True)
    model(ids(1, 3), past_key_values=prompt.past_key_values, use_cache=True)
    model(ids(2, 6), attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]))
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model(ids(1, 6))
    assert len(taken) == LAYERS  # tokens after others, padding on the left, and an attention that sees the future


def test_without_a_gradient_a_row_alone_has_the_bits_that_it_has_in_a_padded_batch(taken):
    model = model_of().eval()
    alone, both = ids(1, 6), torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), ids(1, 6)], dim=1), ids(1, 9)])
    mask, positions = torch.ones(2, 9, dtype=torch.long), torch.arange(9).repeat(2, 1)
    mask[0, :3], positions[0] = 0, torch.tensor([0, 0, 0, 0, 1, 2, 3, 4, 5])
    with torch.no_grad():
        assert torch.equal(model(both, attention_mask=mask, position_ids=positions).logits[0, 3:], model(alone).logits[0])
    assert not taken


class Side(torch.nn.Module):
    """Puts two keys before all others, as prefix tuning does."""

    is_off = False

    def forward(self, attend, query, key, value, mask, documents):
        before = [x[0, :, :2].flip(-1) for x in (key, value)]
        return attend(query, key, value, mask, documents, before=before)


@pytest.mark.parametrize("options", [{"scaling": 0.3}, {"is_causal": False}, {"position_bias": 1}, {"before": True}, {}], ids=str)
@torch.enable_grad()
def test_it_is_sdpas_whatever_the_family_says(options, taken, monkeypatch):
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    if options.pop("before", False):
        module.side = Side()
    if "position_bias" in options:
        options["position_bias"] = torch.linspace(-1, 1, 40 * 40, dtype=torch.bfloat16).view(1, 1, 40, 40)
    q, k, v = (drawn(2, heads, 40, 16, torch.bfloat16, seed) for seed, heads in enumerate((4, 2, 2)))
    found, _ = documents_attention(module, q, k, v, None, **options)
    assert len(taken) == (not options.keys() & {"is_causal", "position_bias"})
    monkeypatch.setattr(product_attention, "are_faster_here", lambda: False)
    expected, _ = documents_attention(module, q, k, v, None, **options)
    assert (found - expected).float().norm() < 0.01 * expected.float().norm()


def test_short_documents_long_lines_and_narrow_heads_are_left_to_sdpa(monkeypatch):
    monkeypatch.setattr(product_attention, "are_faster_here", lambda: True)
    module = torch.nn.Module()
    for length, width, is_taken in ((31, 64, False), (32, 64, True), (32, 32, False), (2048, 64, True), (2049, 64, False)):
        x = torch.empty(1, 1, length, width, dtype=torch.bfloat16)
        assert product_attention._takes(module, x, x, {}) == is_taken
        assert not product_attention._takes(module, x.to("meta"), x, {})


@pytest.mark.parametrize("keys", [{}, {"mlp_chunk": 16, "checkpointing": "block"}], ids=["plain", "MLPs in tiles"])
def test_a_run_by_products_is_planned_with_them(keys, taken, tmp_path):
    recipe = tiny_recipe(tmp_path, base={"dtype": "bfloat16"}, memory={"plan": "tell", "loss_chunk": 8, **keys})
    run(recipe)
    assert taken.in_plans
    record = json.loads((tmp_path / "run" / "memory.json").read_text())
    planned, measured = record["planned"]["phases"]["training"]["bytes"], record["measured"]["training"]["bytes"]
    assert abs(planned - measured) <= max(0.01 * measured, 2100)  # bitsandbytes' code tables of 2 KiB are made once a process


def test_so_are_its_ways_out_and_what_fits_its_budget(taken, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(planning, "ways_out", lambda *_: asked.append(are_traced()) or [])
    recipe = tiny_recipe(tmp_path, base={"dtype": "bfloat16"})
    Planner(recipe, torch.device("cpu"), lambda *_: None).advice(2, 20)
    assert asked == [True]

    def fit(*_):
        asked.append(are_traced())
        raise MachineError("asked")

    monkeypatch.setattr(budget, "fit", fit)
    with pytest.raises(MachineError, match="asked"):
        budget.within_budget(recipe.having({"memory.budget": "1GiB"}), RunFolder(tmp_path / "run"), True, Watcher())
    assert asked == [True, True]


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
    for instructions, tiles, products in ((True, False, True), (True, True, True), (False, False, True), (True, False, False)):
        are_faster_here.cache_clear()
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=instructions: has, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=tiles: has, raising=False)
        monkeypatch.setattr(product_attention, "has_bfloat16_products", lambda has=products: has)
        assert are_faster_here() == (instructions and not tiles and products)
    are_faster_here.cache_clear()
