"""Blocks' inputs in host memory or in 8 bit: the gradient stays, and what is kept between the passes shrinks."""

import gc

import pytest
import torch

from qlite.model.blocks import decoder_blocks
from qlite.model.checkpointing import _HostInput
from qlite.recipe.schema import Memory
from tests.families import FAMILIES, new_model
from tests.model.watch import COPYING, LAYERS, Watch, adapt, are_equal, assert_same, distance, gradient, ids, loss_of, lowered

HOST, EIGHT = Memory(saved_inputs="host"), Memory(saved_inputs="8bit")
MANY = {"num_hidden_layers": 8}
INPUT = 2 * 20 * 64 * 4  # bytes of a block's input [2, 20, 64] float32


def kept_after_forward(memory: Memory) -> int:
    """Return the bytes on the device between the passes."""
    model = lowered("16 bit", memory, MANY)
    with Watch() as watch:
        loss = loss_of(model, ids())
        gc.collect()
        kept = watch.device_bytes
    assert loss.requires_grad
    return kept


def host_inputs() -> list[_HostInput]:
    return [each for each in gc.get_objects() if type(each) is _HostInput]


@pytest.mark.parametrize("method", [{}, {"dropout": 0.3}, {"dora": True}], ids=["lora", "dropout", "dora"])
@pytest.mark.parametrize("storage", ["16 bit", "8 bit", "4 bit"])
def test_inputs_from_the_host_give_the_same_bits(storage, method):
    assert_same(lowered(storage, HOST, **method), lowered(storage, **method), steps=2)


def test_inputs_in_8_bit_move_the_gradient_by_half_a_percent_and_the_loss_not_at_all():
    loss, expected = gradient(lowered())
    found, gradients = gradient(lowered(memory=EIGHT))
    assert torch.equal(found, loss)
    assert 1e-4 < distance(gradients, expected) < 0.01  # measured: 0.0054


def test_inputs_in_8_bit_move_a_bfloat16_gradient_by_less_than_bfloat16_has_moved_it_already():
    _, exact = gradient(lowered())
    _, expected = gradient(lowered(dtype=torch.bfloat16))
    _, gradients = gradient(lowered(memory=EIGHT, dtype=torch.bfloat16))
    by_rounding = distance(expected, exact)
    assert by_rounding < 0.1  # measured: 0.0548
    assert distance(gradients, expected) < 0.3 * by_rounding  # measured: 0.0078
    assert distance(gradients, exact) < 1.05 * by_rounding  # measured: 0.0551


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_hands_its_blocks_the_hidden_states_first(name):
    results = [gradient(adapt(new_model(FAMILIES[name]).requires_grad_(False), memory), ids(tokens=14)) for memory in (Memory(), HOST)]
    assert torch.equal(results[0][0], results[1][0])
    assert are_equal(results[1][1], results[0][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_inputs_kept(name):
    model = adapt(new_model(FAMILIES[name]).requires_grad_(False), HOST)
    loss = loss_of(model, ids(tokens=14))
    kept = host_inputs()
    assert len(kept) == len(decoder_blocks(model)) == 2
    assert {each._leaving._targets[0].shape for each in kept} == {(2, 14, model.config.hidden_size)}
    del kept, loss
    assert host_inputs() == []


def test_on_the_device_stays_the_last_input_of_eight_with_host_and_little_more_than_a_quarter_of_float32_with_8_bit():
    plain = kept_after_forward(Memory())
    assert plain >= 8 * INPUT
    assert kept_after_forward(HOST) == plain - 7 * INPUT
    codes = INPUT // 4
    assert kept_after_forward(EIGHT) == plain - 8 * (INPUT - codes - codes // 64 * 4)


def test_in_the_backward_pass_two_inputs_are_back_at_a_time():
    def peak(memory: Memory) -> int:
        model = lowered("16 bit", memory, MANY)
        gradient(model)  # so that the adapter's gradients are there already
        with Watch() as watch:
            loss_of(model, ids()).backward()
        return watch.peak

    # The peak is in the last block's backward pass: with its own input and the one fetched ahead there, six are not.
    assert peak(HOST) <= peak(Memory()) - 6 * INPUT


def test_while_a_block_is_computed_again_the_input_of_the_one_before_is_on_its_way():
    model = lowered("4 bit", HOST)
    loss = loss_of(model, ids())
    under_way = []
    for block in decoder_blocks(model).values():  # a part of a block runs in the recomputation, too
        block.input_layernorm.register_forward_pre_hook(lambda *_: under_way.append(sum(k._arriving is not None for k in host_inputs())))
    loss.backward()
    assert under_way == [1, 1, 1, 0]


def test_nothing_computes_on_host_memory():
    model = lowered("4 bit", HOST)
    with Watch() as watch:
        gradient(model)
    assert watch.on_host
    assert watch.on_host <= COPYING


def test_a_pass_without_gradients_keeps_nothing():
    model = lowered("4 bit", HOST)
    with torch.no_grad():
        trained = loss_of(model, ids())
        assert torch.equal(loss_of(model.eval(), ids()), trained)
    assert host_inputs() == []


def test_a_forward_pass_that_is_given_up_leaves_the_next_one_alone():
    model = lowered("4 bit", HOST)
    _, expected = gradient(model)
    abandoned = loss_of(model, ids())
    _, gradients = gradient(model)
    assert are_equal(gradients, expected)
    abandoned.backward()
    assert distance({n: p.grad / 2 for n, p in model.named_parameters() if p.requires_grad}, expected) < 1e-6


def test_blocks_are_found_in_the_order_in_which_they_run():
    assert list(decoder_blocks(lowered("16 bit"))) == [f"model.layers.{number}" for number in range(LAYERS)]
