"""Frozen linears: what is stored is the papers' format, and the gradient is that of the dense weight."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlite.quant import linear
from qlite.quant.linear import QuantLinear, Storage, compute_dtype, dense_weight, is_linear
from tests.reference.nf4 import nf4_round_trip

STORAGES = {
    "nf4, double": Storage(4),
    "nf4": Storage(4, double_quant=False),
    "fp4": Storage(4, quant_type="fp4"),
    "nf4, blocks of 128": Storage(4, block_size=128),
    "int8": Storage(8),
}
OUT, IN = 96, 160


def stored(storage: Storage, dtype: torch.dtype = torch.float32, bias: bool = False) -> tuple[nn.Module, torch.Tensor]:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    layer = storage.make(IN, OUT, bias, dtype, "cpu")
    layer.store(weight)
    if bias:
        layer.bias = torch.linspace(-1, 1, OUT).to(dtype)
    return layer, weight


def test_nf4_is_the_papers_format():
    layer, weight = stored(STORAGES["nf4"])
    torch.testing.assert_close(layer.dense(torch.float32), nf4_round_trip(weight), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["nf4, double", "nf4", "fp4", "nf4, blocks of 128"])
def test_four_bit_weights_are_bitsandbytes_weights_bit_for_bit(name):
    storage = STORAGES[name]
    layer, weight = stored(storage)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=storage.block_size, compress_statistics=storage.double_quant, quant_type=storage.quant_type
    )
    assert torch.equal(layer.weight, packed)
    # As one row: bitsandbytes 0.50 on CPU is wrong for rows that are no whole number of blocks.
    state.shape = (1, OUT * IN)
    assert torch.equal(layer.dense(torch.float32), bnb.dequantize_4bit(packed, state).view(OUT, IN))


@pytest.mark.parametrize("columns", [32, 64, 96, 160, 576])
def test_rows_that_end_inside_a_block_are_read_right(columns):
    layer = Storage(4, double_quant=False).make(columns, 64, False, torch.float32, "cpu")
    weight = torch.randn(64, columns)
    layer.store(weight)
    torch.testing.assert_close(layer.dense(torch.float32), nf4_round_trip(weight), rtol=0, atol=1e-6)


def test_int8_rows_are_scaled_to_127():
    layer, weight = stored(STORAGES["int8"])
    half = weight.half().float()
    scale = half.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(layer.dense(torch.float32), torch.round(half * (127 / scale)) * scale / 127, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STORAGES)
def test_product_and_gradient_are_those_of_the_dense_weight(name, dtype):
    layer, _ = stored(STORAGES[name], dtype, bias=True)
    x = torch.randn(2, 5, IN, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, nn.functional.linear(x, layer.dense(dtype), layer.bias))
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(got, grad @ layer.dense(dtype))


def test_backward_reads_the_weight_anew_so_a_moved_weight_gives_the_right_gradient():
    layer, _ = stored(STORAGES["nf4, double"])
    x = torch.randn(3, IN, requires_grad=True)
    y = layer(x)
    expected = torch.ones_like(y) @ layer.dense(torch.float32)
    away = layer.weight.clone()
    layer.weight.zero_()  # as offloading does: the old storage is used for another layer
    layer.weight = away
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


def test_nothing_of_the_weight_is_among_the_tensors_saved_for_backward():
    layer, _ = stored(STORAGES["nf4, double"])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(3, IN, requires_grad=True))
    assert saved == []


def test_the_int8_product_keeps_outlier_features_apart():
    layer, _ = stored(STORAGES["int8"])
    x = torch.randn(16, IN, generator=torch.Generator().manual_seed(1))
    x[:, 7] *= 40  # an outlier feature: quantised with the others it would leave them two or three levels
    exact = x @ layer.dense(torch.float32).T
    error = (layer.int8_product(x) - exact).norm() / exact.norm()
    assert error < 0.02


@pytest.mark.parametrize("name", STORAGES)
def test_a_layer_on_meta_has_the_names_shapes_and_dtypes_of_a_stored_one(name):
    storage = STORAGES[name]
    real, _ = stored(storage, bias=True)
    ghost = storage.make(IN, OUT, True, torch.float32, "meta")

    def facts(layer):
        return {key: (tuple(t.shape), t.dtype) for key, t in layer.named_buffers()}

    assert facts(ghost) == facts(real)
    assert ghost.dense(torch.bfloat16).shape == (OUT, IN)


def test_double_quantised_nf4_takes_4_127_bits_a_weight():
    layer = Storage(4).make(4096, 4096, False, torch.bfloat16, "meta")
    own = [layer.weight, layer.absmax, layer.absmax_scale]  # and 1 KiB of codes a layer
    bits = 8 * sum(t.nbytes for t in own) / 4096**2
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_storage_is_a_frozen_linear(bits):
    layer = Storage(bits).make(IN, OUT, True, torch.bfloat16, "cpu")
    assert is_linear(layer)
    assert compute_dtype(layer) == torch.bfloat16
    assert not any(p.requires_grad for p in layer.parameters())
    assert isinstance(layer, QuantLinear) == (bits < 16)


def test_dense_weight_is_a_copy():
    layer = nn.Linear(4, 4)
    dense_weight(layer).zero_()
    assert layer.weight.abs().sum() > 0


# Weights that are too large to be dense at once


@pytest.fixture
def small_slices(monkeypatch) -> None:
    """Let 20 dense float32 rows be the most that fit (40 of bfloat16); of 96 the last slice is ragged."""
    monkeypatch.setattr(linear, "SLICE_BYTES", 20 * 4 * IN)
    monkeypatch.setattr(linear, "SLICED_FROM", 1)


SLICED = STORAGES | {"nf4, blocks of 32": Storage(4, block_size=32), "fp4, no double": Storage(4, quant_type="fp4", double_quant=False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SLICED)
def test_slices_of_the_dense_weight_are_its_rows_bit_for_bit(name, dtype, small_slices):
    layer, _ = stored(SLICED[name])
    parts = layer.slices(dtype)
    assert len(parts) == (5 if dtype == torch.float32 else 3)
    assert [row for part in parts for row in range(OUT)[part]] == list(range(OUT))
    whole = layer.dense(dtype)
    for part in parts:
        assert torch.equal(layer.dense(dtype, part), whole[part])
        assert layer.dense(dtype, part).nbytes <= max(linear.SLICE_BYTES, layer.row_step * IN * dtype.itemsize)


@pytest.mark.parametrize("name", SLICED)
def test_a_weight_that_comes_in_slices_is_stored_as_one_that_comes_whole(name, monkeypatch):
    whole, weight = stored(SLICED[name])
    monkeypatch.setattr(linear, "SLICE_BYTES", 20 * 4 * IN)
    monkeypatch.setattr(linear, "SLICED_FROM", 1)
    sliced = SLICED[name].make(IN, OUT, False, torch.float32, "meta")
    sliced.store(weight, "cpu")
    assert whole.packed_tensors().keys() == sliced.packed_tensors().keys()
    assert all(torch.equal(t, sliced.packed_tensors()[key]) for key, t in whole.packed_tensors().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (2, 5, IN)])
@pytest.mark.parametrize("name", SLICED)
def test_the_sliced_product_and_gradient_are_those_of_the_whole_weight(name, shape, dtype, small_slices):
    layer, _ = stored(SLICED[name], dtype, bias=True)
    assert OUT % len(range(OUT)[layer.slices(dtype)[0]]) != 0  # the last slice is ragged
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (*shape[:-1], OUT))
    reference = layer.dense(torch.float32)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-1}
    torch.testing.assert_close(y.float(), nn.functional.linear(x.float(), reference, layer.bias.float()), **close)
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    assert (got.dtype, got.shape) == (dtype, shape)
    torch.testing.assert_close(got.float(), grad.float() @ reference, **close)


@pytest.mark.parametrize("name", [name for name, storage in SLICED.items() if storage.bits == 4])
def test_the_cards_call_for_a_slice_gives_its_outputs(name, monkeypatch):
    # On CUDA; bitsandbytes has it for the CPU, too, where it tells a slice's weights, constants and bias from wrong ones.
    layer = SLICED[name].make(128, OUT, True, torch.float32, "cpu")
    layer.store(torch.randn(OUT, 128))
    layer.bias = torch.linspace(-1, 1, OUT)
    x = torch.randn(2, 3, 128)
    expected = nn.functional.linear(x, layer.dense(torch.float32), layer.bias)
    monkeypatch.setattr(linear, "SLICE_BYTES", 20 * 4 * 128)
    monkeypatch.setattr(linear, "SLICED_FROM", 1)
    for part in [linear.ALL, *layer.slices(torch.float32)]:
        torch.testing.assert_close(layer._gemm(x, part), expected[..., part])


@pytest.mark.parametrize("bits", [4, 8])
def test_slices_leave_the_gradient_in_bfloat16_as_exact_as_one_product(bits, monkeypatch):
    layer = Storage(bits).make(256, 4096, False, torch.bfloat16, "cpu")
    layer.store(torch.randn(4096, 256, generator=torch.Generator().manual_seed(0)))
    grad = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = grad.double() @ layer.dense(torch.bfloat16).double()

    def error() -> float:
        return float((layer.product_with_grad(grad).double() - exact).norm() / exact.norm())

    whole = error()
    monkeypatch.setattr(linear, "SLICE_BYTES", 64 * 256 * 2)
    monkeypatch.setattr(linear, "SLICED_FROM", 1)
    assert len(layer.slices(torch.bfloat16)) == 64
    assert error() < 1.5 * whole  # summed in bfloat16: 5.8 times


@pytest.mark.parametrize("bits", [4, 8])
def test_no_dense_tensor_of_a_large_weight_is_larger_than_a_slice(bits, monkeypatch):
    rows, columns = 4096, 128
    monkeypatch.setattr(linear, "SLICE_BYTES", rows * columns * 4 // 16)
    monkeypatch.setattr(linear, "SLICED_FROM", 1)
    layer = Storage(bits).make(columns, rows, False, torch.float32, "cpu")
    weight = torch.randn(rows, columns, dtype=torch.bfloat16)
    with LargestTensor() as storing:
        layer.store(weight)
    x = torch.randn(3, columns, requires_grad=True)
    with LargestTensor() as seen:
        layer(x).sum().backward()
    assert linear.SLICE_BYTES <= seen.bytes <= linear.SLICE_BYTES + 4096
    assert storing.bytes <= linear.SLICE_BYTES


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest floating-point tensor that any operation gives."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = [t.nbytes for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        self.bytes = max([self.bytes, *found])
        return result
