"""Packed embeddings: a lookup gives the dense table's rows bit for bit, and never makes the table."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from qlite.quant import linear
from qlite.quant.embedding import QuantEmbedding, matrix_of
from qlite.quant.linear import Storage
from tests.quant.test_linear import LargestTensor

STORAGES = {
    "int8": Storage(8),
    "nf4, double": Storage(4),
    "nf4": Storage(4, double_quant=False),
    "fp4": Storage(4, quant_type="fp4"),
    "nf4, blocks of 32": Storage(4, block_size=32),
    "nf4, blocks of 1024": Storage(4, block_size=1024),
}
# The largest relative error of the table in the Frobenius norm, on normal weights.
ERRORS = {"int8": 0.01, "nf4, double": 0.1, "nf4": 0.1, "fp4": 0.13, "nf4, blocks of 32": 0.09, "nf4, blocks of 1024": 0.13}
V = 61


class Backwards(nn.Embedding):
    """A family's own class that adds to each row what only its own code knows."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].flip(-1) + 1


def quantised(embedding: nn.Embedding, storage: Storage, dtype: torch.dtype = torch.float32) -> tuple[QuantEmbedding, Tensor]:
    """Return ``embedding`` in ``storage``, and its dense table as it is then."""
    packed = QuantEmbedding(embedding, storage, dtype)
    table = torch.randn(embedding.num_embeddings, embedding.embedding_dim, generator=torch.Generator().manual_seed(0))
    table[5] = 0  # as the row of a padding token often is
    packed.store(table)
    return packed, table


def width(storage: Storage) -> int:
    return max(96 if storage.block_size == 32 else 128, storage.block_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STORAGES)
def test_a_lookup_is_that_in_the_dense_table_bit_for_bit(name, dtype):
    storage = STORAGES[name]
    packed, table = quantised(nn.Embedding(V, width(storage)), storage, dtype)
    dense = packed.table.dense(dtype)
    ids = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(1))
    ids[0, :3] = torch.tensor([0, V - 1, 5])
    got = packed(ids)
    assert got.dtype == dtype
    assert torch.equal(got, nn.functional.embedding(ids, dense))
    assert torch.equal(packed(ids.int()), got)
    assert (dense[5] == 0).all()
    assert (dense.float() - table).norm() < ERRORS[name] * table.norm()


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("bits", [4, 8])
def test_ids_of_any_shape_give_a_row_each(bits, shape):
    packed, _ = quantised(nn.Embedding(V, 64), Storage(bits))
    ids = torch.randint(V, shape)
    assert torch.equal(packed(ids), packed.table.dense(torch.float32)[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_familys_scale_is_applied_by_its_own_code(bits, dtype):
    own = Gemma3TextScaledWordEmbedding(V, 64, padding_idx=20, embed_scale=64**0.5).to(dtype)
    packed, _ = quantised(Gemma3TextScaledWordEmbedding(V, 64, padding_idx=20, embed_scale=64**0.5), Storage(bits), dtype)
    own.weight.data = packed.table.dense(dtype)
    ids = torch.tensor([[3, 20], [20, 60]])
    assert torch.equal(packed(ids), own(ids))
    assert packed.padding_idx == 20
    assert list(packed.parameters()) == []


def test_a_family_may_read_its_table_in_its_own_way():
    packed, _ = quantised(Backwards(V, 64), Storage(8))
    ids = torch.tensor([7, 7, 9])
    assert torch.equal(packed(ids), packed.table.dense(torch.float32)[ids].flip(-1) + 1)


@pytest.mark.parametrize("kind", [nn.Embedding, Backwards])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_lookup_makes_no_more_than_its_rows_dense(bits, kind):
    packed, _ = quantised(kind(V, 64), Storage(bits))
    with LargestTensor() as seen:
        packed(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert seen.bytes == 6 * 64 * 4


@pytest.mark.parametrize("name", STORAGES)
def test_an_embedding_on_meta_has_the_names_shapes_and_dtypes_of_a_stored_one(name):
    storage = STORAGES[name]
    real, _ = quantised(nn.Embedding(V, width(storage)), storage)
    ghost = QuantEmbedding(nn.Embedding(V, width(storage), device="meta"), storage, torch.float32)

    def facts(module: nn.Module) -> dict:
        return {key: (tuple(t.shape), t.dtype) for key, t in module.named_buffers()}

    assert facts(ghost) == facts(real)
    assert ghost(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, width(storage))


def test_a_head_that_shares_the_table_holds_the_same_memory():
    packed, table = quantised(nn.Embedding(V, 64), Storage(4))
    head = Storage(4).make(64, V, True, torch.float32, "meta")
    bias = head.bias = torch.linspace(-1, 1, V)
    head.share(matrix_of(packed))
    assert {t.data_ptr() for t in head.packed_tensors().values()} == {t.data_ptr() for t in packed.buffers()}
    assert head.bias is bias
    assert torch.equal(head.dense(torch.float32), packed.table.dense(torch.float32))
    assert (head(torch.eye(64)) - bias - table.T).norm() < 0.1 * table.norm()


@pytest.mark.parametrize("kind", [nn.Embedding, Backwards])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_lookup_and_a_sliced_product_can_be_traced_without_numbers(bits, kind, monkeypatch):
    monkeypatch.setattr(linear, "SLICE_BYTES", 20 * 64 * 4)
    monkeypatch.setattr(linear, "SLICED_FROM", 1)
    with FakeTensorMode():
        packed = QuantEmbedding(kind(V, 64), Storage(bits), torch.float32)
        head = Storage(bits).make(64, V, True, torch.float32, "cpu")
        head.share(packed.table)
        lora = nn.Linear(64, 64)
        logits = head(lora(packed(torch.zeros(2, 3, dtype=torch.long))))
        logits.sum().backward()
    assert logits.shape == (2, 3, V)
    assert lora.weight.grad.shape == (64, 64)
