"""What only a card can show of embedding and head in few bits. Run with pytest -n 0 -m gpu."""

import pytest
import torch
from torch import nn

from qlite.quant import linear
from qlite.quant.embedding import QuantEmbedding
from qlite.quant.linear import Storage
from tests.quant.test_embedding import STORAGES, V, width
from tests.tiny_run import run, tiny_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]


def stored_twice(storage: Storage) -> tuple[QuantEmbedding, QuantEmbedding]:
    """Return one table on the CPU and the same on the card, in bfloat16."""
    pair = [QuantEmbedding(nn.Embedding(V, width(storage)), storage, torch.bfloat16) for _ in range(2)]
    pair[0].store(torch.randn(V, width(storage), generator=torch.Generator().manual_seed(0)))
    pair[1].table.share(pair[0].table)
    return pair[0], pair[1].to("cuda")


@pytest.mark.parametrize("name", STORAGES)
def test_a_lookup_on_the_card_is_that_in_the_dense_table_bit_for_bit(name):
    ours, card = stored_twice(STORAGES[name])
    ids = torch.randint(V, (3, 7))
    got = card(ids.cuda())
    assert torch.equal(got, card.table.dense(torch.bfloat16)[ids.cuda()])
    assert (got.cpu().float() - ours(ids).float()).norm() < 0.01 * ours(ids).float().norm()


@pytest.mark.parametrize("rows", [1, 4, 5, 64, 2000])
@pytest.mark.parametrize("name", STORAGES)
def test_the_sliced_product_and_gradient_on_the_card_are_those_of_the_dense_weight(name, rows, monkeypatch):
    storage = Storage(**{**vars(STORAGES[name]), "int8_product": False})
    head = storage.make(width(storage), V, True, torch.bfloat16, "cuda")
    head.store(torch.randn(V, width(storage), device="cuda"))
    head.bias = torch.linspace(-1, 1, V, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(linear, "SLICE_BYTES", 20 * 2 * width(storage))
    monkeypatch.setattr(linear, "SLICED_FROM", 1)
    assert len(head.slices(torch.bfloat16)) > 2
    dense = head.dense(torch.float32)
    x = torch.randn(rows, width(storage), device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = head(x)
    want = nn.functional.linear(x.float(), dense, head.bias.float())
    assert (y.float() - want).norm() < 0.02 * want.norm()
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    assert (got.float() - grad.float() @ dense).norm() < 0.02 * got.float().norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_no_step_of_a_large_head_on_the_card_holds_it_dense(bits):
    columns, rows = 2048, 128 * 1024
    head = Storage(bits, int8_product=False).make(columns, rows, False, torch.bfloat16, "cuda")
    head.store(torch.randn(rows, columns, dtype=torch.bfloat16), "cuda")
    x = torch.randn(16, columns, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head(x).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * linear.SLICE_BYTES < 2 * rows * columns


@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_on_the_card_learns(bits, tmp_path):
    seen = run(tiny_recipe(tmp_path, base={"embedding_bits": bits, "head_bits": bits}, parallel={"device": "cuda"}))
    assert seen.steps[-1].loss < seen.steps[0].loss
