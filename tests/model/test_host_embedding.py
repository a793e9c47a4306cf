"""The embedding in host memory: the same rows, in any storage, and a refusal where the head is the same tensor."""

import pytest
import torch

from qlite.errors import ModelError
from qlite.offload import is_host
from qlite.quant.embedding import QuantEmbedding
from qlite.quant.linear import Storage
from qlite.recipe.schema import Memory
from tests.families import FAMILIES, new_model
from tests.model.watch import COPYING, Watch, adapt, are_equal, gradient, ids, loss_of, lowered
from tests.tiny import tiny_llama

HOST = Memory(embedding="host")
TIED = [name for name, family in FAMILIES.items() if family.config().tie_word_embeddings]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in TIED])
def test_loss_and_gradient_are_the_same_bits(name):
    plain, host = (adapt(new_model(FAMILIES[name]).requires_grad_(False), memory) for memory in (Memory(), HOST))
    loss, expected = gradient(plain, ids(tokens=14))
    with Watch() as watch:
        found, gradients = gradient(host, ids(tokens=14))
    assert torch.equal(found, loss)
    assert are_equal(gradients, expected)
    assert watch.on_host & {"aten::embedding", "aten::index_select"}
    assert all(is_host(t) for t in host.get_input_embeddings().parameters())


@pytest.mark.parametrize("name", TIED)
def test_a_tied_one_is_refused(name):
    with pytest.raises(ModelError, match=r'memory.embedding = "host": .*one tensor .*memory.embedding = "device"'):
        adapt(new_model(FAMILIES[name]).requires_grad_(False), HOST)


def quantised(model: torch.nn.Module, bits: int, is_tied: bool = False) -> torch.nn.Module:
    """Put ``model``'s embedding into few bits; a tied head shares its tensors."""
    storage, dense = Storage(bits), model.get_input_embeddings()
    packed = QuantEmbedding(dense, storage, torch.float32)
    packed.store(dense.weight.data)
    model.set_input_embeddings(packed)
    if is_tied:
        head = storage.make(64, 64, False, torch.float32, "cpu")
        head.share(packed.table)
        model.set_output_embeddings(head)
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_one_is_looked_up_and_made_dense_on_the_host(bits):
    plain, host = (adapt(quantised(tiny_llama("4 bit"), bits), memory) for memory in (Memory(), HOST))
    loss, expected = gradient(plain)
    found, gradients = gradient(host)
    assert torch.equal(found, loss)
    assert are_equal(gradients, expected)
    assert is_host(host.get_input_embeddings().table.weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_tied_one_is_refused(bits):
    with pytest.raises(ModelError, match=r'memory.embedding = "host"'):
        adapt(quantised(tiny_llama("4 bit"), bits, is_tied=True), HOST)


def test_the_device_gets_the_rows_and_never_the_table():
    sizes = {"vocab_size": 5000}
    table = 5000 * 64 * 4
    model = lowered("4 bit", HOST, sizes)
    with Watch() as watch:
        loss_of(model, ids()).backward()
    assert watch.largest < table / 8
    assert watch.on_host <= COPYING | {"aten::embedding"}
