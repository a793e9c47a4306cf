"""The MLP in tiles: same output and gradient, a tile's intermediates, and no further pass through the MLP."""

import copy

import pytest
import torch
from torch import nn

from qlite.errors import ModelError
from qlite.methods.base import adapters_off, trainable_tensors
from qlite.model.blocks import decoder_blocks
from qlite.model.tiling import block_mlps
from qlite.recipe.schema import Memory
from tests.families import FAMILIES, new_model
from tests.model.watch import LAYERS, Watch, adapt, distance, gradient, ids, loss_of, lowered

TILES = Memory(mlp_chunk=7)
ALONE = Memory(mlp_chunk=7, checkpointing="none")
ROUNDING = 1e-6


@pytest.mark.parametrize("memory", [TILES, ALONE, Memory(mlp_chunk=40), Memory(mlp_chunk=1)], ids=["checkpoint", "keep", "one", "single"])
@pytest.mark.parametrize("method", [{}, {"dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("storage", ["16 bit", "8 bit", "4 bit"])
def test_output_and_gradient_are_the_untiled_ones_but_for_the_order_of_sums(storage, method, memory):
    loss, expected = gradient(lowered(storage, **method))
    found, gradients = gradient(lowered(storage, memory, **method))
    assert torch.allclose(found, loss, rtol=1e-5)
    assert distance(gradients, expected) < ROUNDING


def test_a_bfloat16_gradient_is_rounded_once_over_all_tiles():
    _, exact = gradient(lowered())
    _, untiled = gradient(lowered(dtype=torch.bfloat16))
    _, tiled = gradient(lowered(memory=Memory(mlp_chunk=1), dtype=torch.bfloat16))
    assert distance(tiled, exact) < 1.1 * distance(untiled, exact)


@pytest.mark.parametrize("checkpointing", ["block", "none"])
def test_dropout_is_drawn_again_alike(checkpointing):
    # With the draws of each tile kept, the loss is a function of A and B: its slope along a direction is the gradient's part there.
    model = lowered("16 bit", Memory(mlp_chunk=7, checkpointing=checkpointing), dropout=0.4).double()
    _, gradients = gradient(model)
    direction = {name: torch.randn(p.shape, dtype=p.dtype) for name, p in trainable_tensors(model).items()}
    slope = sum((gradients[name] * d).sum() for name, d in direction.items()).item()

    def moved(by: float) -> float:
        other = copy.deepcopy(model)
        for name, p in trainable_tensors(other).items():
            p.data += by * direction[name]
        with torch.no_grad():
            return loss_of(other, ids()).item()

    assert (moved(1e-5) - moved(-1e-5)) / 2e-5 == pytest.approx(slope, rel=1e-4)


def test_drawing_again_leaves_the_generators_where_they_were():
    model = lowered("4 bit", TILES, dropout=0.4)
    loss = loss_of(model, ids())
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_only_a_tiles_intermediates_live():
    sizes = {"intermediate_size": 2048, "num_hidden_layers": 1}
    wide = 64 * 2048 * 4  # bytes of all tokens' [64, 2048]
    largest, peak = {}, {}
    for chunk in (0, 8):
        model = lowered("16 bit", Memory(mlp_chunk=chunk), sizes)
        gradient(model, ids(2, 32))
        with Watch() as watch:
            loss_of(model, ids(2, 32)).backward()
        largest[chunk], peak[chunk] = watch.largest, watch.peak
    assert largest[0] == wide
    assert largest[8] == wide // 8
    # Untiled, at least the outputs of gate, up and activation and their product live at a time; of a tile the same, eight times smaller.
    assert peak[0] > 4 * wide
    assert peak[8] < peak[0] / 3.5


def test_no_token_goes_through_the_mlp_once_more_than_untiled():
    counts = {}
    for chunk in (0, 7):
        model = lowered("16 bit", Memory(mlp_chunk=chunk))
        seen = []
        for block in model.model.layers:
            block.mlp.act_fn.register_forward_hook(lambda _, args, _out: seen.append(args[0].shape[:-1].numel()))  # noqa: B023
        gradient(model)
        counts[chunk] = sum(seen)
    assert counts[0] == counts[7] == 2 * LAYERS * 40


def test_few_tokens_go_as_they_are_and_without_gradients_nothing_is_kept():
    plain, tiled = lowered().eval(), lowered(memory=TILES).eval()
    with torch.no_grad():
        for tokens in (ids(1, 1), ids(1, 7), ids(2, 20)):
            assert torch.allclose(loss_of(tiled, tokens), loss_of(plain, tokens), rtol=1e-5)


def test_an_adapter_of_the_mlp_alone_learns_in_the_first_block_too():
    _, expected = gradient(lowered(targets=("gate_proj", "down_proj")))
    _, gradients = gradient(lowered(memory=TILES, targets=("gate_proj", "down_proj")))
    assert len(gradients) == 4 * LAYERS
    assert distance(gradients, expected) < ROUNDING


def test_names_stay_and_the_adapter_can_be_taken_off():
    plain, tiled = lowered(), lowered(memory=TILES)
    assert list(plain.state_dict()) == list(tiled.state_dict())
    with torch.no_grad(), adapters_off(plain), adapters_off(tiled):
        assert torch.allclose(loss_of(tiled.eval(), ids()), loss_of(plain.eval(), ids()), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "opt"])
def test_every_familys_mlp_is_found(name):
    results = [gradient(adapt(new_model(FAMILIES[name]).requires_grad_(False), memory), ids(tokens=14)) for memory in (Memory(), TILES)]
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-4)
    assert distance(results[1][1], results[0][1]) < 2e-5
    model = new_model(FAMILIES[name])
    found = [mlp for block in decoder_blocks(model).values() for mlp in block_mlps(block)]
    assert [type(mlp).__name__.endswith("MLP") for mlp in found] == [True, True]


def test_a_block_without_an_mlp_of_its_own_is_refused():
    model = new_model(FAMILIES["opt"]).requires_grad_(False)
    with pytest.raises(ModelError, match=r'memory.mlp_chunk = 7: the family "opt" .*model\.decoder\.layers\.0.*memory.mlp_chunk = 0'):
        adapt(model, TILES)


def test_what_is_no_mlp_is_not_taken_for_one():
    block = nn.Module()
    block.norm, block.linear = nn.LayerNorm(4), nn.Linear(4, 4)
    block.attention = nn.MultiheadAttention(4, 1)
    assert block_mlps(block) == []
