"""Blocks' weights in host memory: every product reads the copy on the device, of two blocks at most, and gives the same bits."""

import gc

import pytest
import torch

from qlite.methods.base import adapters_off, trainable_tensors
from qlite.model.blocks import decoder_blocks
from qlite.offload import frozen_tensors, is_host
from qlite.quant.linear import dense_weight
from qlite.recipe.schema import Memory
from tests.families import FAMILIES, new_model
from tests.model.watch import COPYING, Watch, adapt, are_equal, gradient, ids, loss_of, lowered

HOST = Memory(base="host")
# A size that nothing else has: bytes of gate_proj, up_proj or down_proj, [136, 64], in float32 and in 4 bit.
SIZES = {"intermediate_size": 136, "num_hidden_layers": 6}
DENSE, PACKED = 136 * 64 * 4, 136 * 64 // 2


@pytest.mark.parametrize("method", [{}, {"dropout": 0.3}, {"dora": True}], ids=["lora", "dropout", "dora"])
@pytest.mark.parametrize("storage", ["16 bit", "8 bit", "4 bit"])
def test_loss_and_gradient_are_the_same_bits(storage, method):
    loss, expected = gradient(lowered(storage, **method))
    model = lowered(storage, HOST, **method)
    for _ in range(2):
        found, gradients = gradient(model)
        assert torch.equal(found, loss)
        assert are_equal(gradients, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_streamed(name):
    plain, streamed = (adapt(new_model(FAMILIES[name]).requires_grad_(False), memory) for memory in (Memory(), HOST))
    loss, expected = gradient(plain, ids(tokens=14))
    with Watch() as watch:
        found, gradients = gradient(streamed, ids(tokens=14))
    assert torch.equal(found, loss)
    assert are_equal(gradients, expected)
    assert watch.on_host <= COPYING


@pytest.mark.parametrize("targets", ["all-linear", ("down_proj",), ("q_proj",)])
@pytest.mark.parametrize("storage", ["16 bit", "8 bit", "4 bit"])
def test_nothing_computes_on_host_memory_in_either_pass(storage, targets):
    model = lowered(storage, HOST, targets=targets)
    with Watch() as watch:
        gradient(model)
    assert watch.on_host
    assert watch.on_host <= COPYING


@pytest.mark.parametrize(("storage", "size"), [("16 bit", DENSE), ("4 bit", PACKED)])
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "answering"])
def test_the_weights_of_two_blocks_are_on_the_device_and_no_more(storage, size, is_training):
    model = lowered(storage, HOST, SIZES).train(is_training)
    with Watch(size) as watch, torch.set_grad_enabled(is_training):
        for _ in range(2):
            loss = loss_of(model, ids())
            if is_training:
                loss.backward()
    assert watch.most_of_size == 2 * 3


def test_between_steps_one_blocks_weights_are_on_the_device():
    model = lowered("4 bit", HOST, SIZES)
    gradient(model)
    gc.collect()
    where = [{is_host(t) for _, _, t in frozen_tensors(block)} for block in decoder_blocks(model).values()]
    assert where == [{False}, *[{True}] * 5]


def test_the_adapter_stays_on_the_device():
    model = lowered("4 bit", HOST)
    assert not any(is_host(p) for p in trainable_tensors(model).values())
    assert not is_host(model.get_output_embeddings().weight)


def test_evaluation_in_between_and_the_base_alone_give_the_same_bits():
    plain, streamed = lowered(), lowered(memory=HOST)
    for model in (plain, streamed):
        gradient(model)
        model.eval()
    with torch.no_grad():
        assert torch.equal(loss_of(streamed, ids()), loss_of(plain, ids()))
        with adapters_off(plain), adapters_off(streamed):
            assert torch.equal(loss_of(streamed, ids()), loss_of(plain, ids()))
    assert are_equal(gradient(streamed.train())[1], gradient(plain.train())[1])


def test_a_forward_pass_that_broke_off_leaves_the_next_step_alone():
    _, expected = gradient(lowered())
    model = lowered(memory=HOST)
    hook = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model, ids())
    hook.remove()
    assert are_equal(gradient(model)[1], expected)


def test_dense_weights_can_be_read_wherever_they_lie():
    plain, streamed = lowered(), lowered(memory=HOST)
    gradient(streamed)
    for one, other in zip(plain.model.layers, streamed.model.layers, strict=True):
        assert torch.equal(dense_weight(one.mlp.up_proj.base), dense_weight(other.mlp.up_proj.base))
