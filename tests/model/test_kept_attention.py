"""A block that keeps its attention gives the same bits, runs each attention kernel once, and holds just what that gave more."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from qlite.errors import ModelError
from qlite.methods.base import trainable_tensors
from qlite.model.documents import attend_by_documents
from qlite.model.head import hidden_states
from qlite.recipe.schema import Memory
from tests.model.watch import LAYERS, Watch, adapt, are_equal, distance, gradient, ids, loss_of
from tests.tiny import tiny_llama

KEPT = Memory(checkpointing="attention")


def model_of(memory: Memory, storage: str = "4 bit", sizes: dict | None = None, **method) -> PreTrainedModel:
    model = tiny_llama(storage, torch.float32, **{"num_hidden_layers": LAYERS, **(sizes or {})})
    attend_by_documents(model)
    return adapt(model, memory, **method)


class Attentions(TorchDispatchMode):
    """Counts attention's forward kernels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.count += "_scaled_dot_product_" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [{}, {"dropout": 0.3}, {"dora": True}], ids=["lora", "dropout", "dora"])
@pytest.mark.parametrize("storage", ["16 bit", "4 bit"])
def test_the_bits_are_those_of_every_other_checkpointing(storage, method):
    loss, expected = gradient(model_of(KEPT, storage, **method))
    for checkpointing in ("block", "none"):
        found, gradients = gradient(model_of(Memory(checkpointing=checkpointing), storage, **method))
        assert torch.equal(found, loss)
        assert are_equal(gradients, expected)


@pytest.mark.parametrize("keys", [{"saved_inputs": "host"}, {"base": "host"}, {"mlp_chunk": 7}], ids=str)
def test_it_goes_together_with_the_other_keys(keys):
    loss, expected = gradient(model_of(Memory(checkpointing="block", **keys)))
    found, gradients = gradient(model_of(Memory(checkpointing="attention", **keys)))
    assert torch.equal(found, loss)
    assert are_equal(gradients, expected)


def test_with_inputs_in_8_bit_the_gradient_is_no_farther_off():
    _, exact = gradient(model_of(Memory(checkpointing="none")))
    _, by_block = gradient(model_of(Memory(checkpointing="block", saved_inputs="8bit")))
    _, found = gradient(model_of(Memory(checkpointing="attention", saved_inputs="8bit")))
    assert 1e-4 < distance(found, exact) < 1.2 * distance(by_block, exact)


@pytest.mark.parametrize(("checkpointing", "times"), [("none", 1), ("attention", 1), ("block", 2)])
def test_each_attention_is_computed_once(checkpointing, times):
    model = model_of(Memory(checkpointing=checkpointing))
    with Attentions() as seen:
        loss_of(model, ids()).backward()
    assert seen.count == times * LAYERS


@pytest.mark.parametrize(("checkpointing", "times"), [("attention", 1), ("block", 2)])
def test_so_is_that_of_each_document_of_a_packed_line(checkpointing, times):
    positions = torch.cat([torch.arange(5), torch.arange(9), torch.arange(6)]).repeat(2, 1)
    grads = []
    for memory in (Memory(checkpointing=checkpointing), Memory(checkpointing="none")):
        model = model_of(memory)
        with Attentions() as seen:
            hidden_states(model, ids(), positions).square().sum().backward()
        grads.append({name: p.grad for name, p in trainable_tensors(model).items()})
        if memory.checkpointing == checkpointing:
            assert seen.count == times * LAYERS * 6
    assert are_equal(*grads)


class Dense(TorchDispatchMode):
    """Counts how often a packed weight is made dense."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name == "bitsandbytes::dequantize_4bit"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=str)
def test_each_weight_is_made_dense_twice(targets):
    model = model_of(KEPT, targets=targets)
    with Dense() as seen:
        loss_of(model, ids()).backward()
    assert seen.count == 2 * 7 * LAYERS


def test_what_is_kept_more_is_what_attention_gave():
    def kept(checkpointing: str) -> int:
        model = model_of(Memory(checkpointing=checkpointing))
        with Watch() as watch:
            loss = loss_of(model, ids())
            held = watch.device_bytes
        assert loss.requires_grad
        return held

    tokens, heads, size = 2 * 20, 4, 16
    assert kept("attention") - kept("block") == LAYERS * tokens * heads * (size + 1) * 4


def test_attention_that_drops_is_computed_again_so_that_later_draws_are_the_same():
    sizes = {"attention_dropout": 0.2}
    loss, expected = gradient(model_of(Memory(checkpointing="block"), sizes=sizes, dropout=0.3))
    found, gradients = gradient(model_of(KEPT, sizes=sizes, dropout=0.3))
    assert torch.equal(found, loss)
    assert are_equal(gradients, expected)


def test_a_step_after_a_failed_one_begins_with_nothing_kept():
    model = model_of(KEPT)
    _, expected = gradient(model)
    loss = loss_of(model, ids())
    loss.register_hook(_planted)
    with pytest.raises(RuntimeError, match="planted"):
        loss.backward()
    assert are_equal(gradient(model)[1], expected)


def _planted(_: torch.Tensor) -> None:
    raise RuntimeError("planted")


def test_attention_of_another_kind_is_refused():
    with pytest.raises(ModelError, match=r'checkpointing = "attention": .* this "llama" computes "eager" attention'):
        adapt(tiny_llama("16 bit", attn_implementation="eager"), KEPT)
