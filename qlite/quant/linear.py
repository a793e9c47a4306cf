"""How a frozen weight is stored, and the linear layer over it: the only module that knows.

Everything else calls a base linear as ``y = base(x)`` and asks here for its shape, its compute dtype or its dense
weight. The 4- and 8-bit formats and their kernels are bitsandbytes' (Dettmers et al. 2023, arXiv:2305.14314, section 3;
Dettmers et al. 2022, arXiv:2208.07339, section 3); the layers and the autograd function are our own, because
bitsandbytes' modules move and repack their weights during use and its autograd function keeps them on ``ctx``.
"""

import math
from dataclasses import dataclass
from typing import Literal

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlite.quant.card_dense import dense_nf4
from qlite.quant.constants import SECOND_LEVEL_BLOCK, Share, less_offset
from qlite.quant.keeping import keeping
from qlite.quant.nf4 import quantize_4bit

# Activations at least this large stay out of the int8 product (arXiv:2208.07339, section 3.2).
OUTLIER_THRESHOLD = 6.0
# A large weight is made dense, multiplied and dropped in slices of its rows, of so many bytes each. Large means more than four of
# them: Llama-3.1-8B's output head takes 1 GiB in bfloat16. The largest linear of its blocks takes 112 MiB: in slices, the float32
# sum of its gradient over 4096 tokens alone would take 224.
SLICE_BYTES = 64 * 2**20
SLICED_FROM = 4
# bitsandbytes 0.50 multiplies so few rows by the packed weight as it is on every card, and no more than so many on any (cuda/ops.py).
FEW_ROWS, MOST_FUSED_ROWS = 4, 1536
# Rows of an 8-bit weight that are made dense together on a CPU: 2 to 16 MiB in float32.
CPU_ROWS = 1024
ALL = slice(None)


@dataclass(frozen=True)
class Storage:
    """How the frozen weights of one part of a model (its blocks, its embedding, its head) are stored."""

    bits: Literal[4, 8, 16]
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    block_size: int = 64
    int8_product: bool = True
    """8 bit on CUDA: multiply int8 by int8; False: by the dequantised weight, which keeps the digits of x."""

    def make(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """Return an empty frozen linear [out_features, in_features] of this storage; ``store_weight`` fills it."""
        if self.bits == 16:
            return nn.Linear(in_features, out_features, bias, device=device, dtype=dtype).requires_grad_(False)
        return (Linear8bit if self.bits == 8 else Linear4bit)(self, in_features, out_features, dtype, device, bias)

    def make_table(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> "Packed":
        """Return an empty packed matrix [rows, columns] of this storage, which has 4 or 8 bits."""
        return (Packed8bit if self.bits == 8 else Packed4bit)(self, columns, rows, dtype, device)


class Packed(nn.Module):
    """A frozen matrix [out, in] in few bits. Its tensors are buffers: no optimizer and no ``.grad`` ever sees them."""

    def __init__(self, storage: Storage, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.storage = storage
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, dtype

    def store(self, weight: Tensor, device: torch.device | str | None = None) -> None:
        """Quantise ``weight`` [out, in], any float dtype, on ``device`` (default: where it lies), a slice of rows at a time."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype, part: slice = ALL) -> Tensor:
        """Return the weight, or the rows ``part`` of it (one of ``slices``), as a new dense tensor [out, in]."""
        raise NotImplementedError

    def rows(self, places: Tensor) -> Tensor:
        """Return the rows at ``places`` [N] as a new dense tensor [N, in] in the compute dtype: the dense weight's, bit for bit.

        4 bit: a row must be a whole number of blocks.
        """
        raise NotImplementedError

    def slices(self, dtype: torch.dtype) -> list[slice]:
        """Return all rows or, of a large weight, slices of at most ``SLICE_BYTES`` dense in ``dtype`` each (or one step of rows)."""
        fit, step = SLICE_BYTES // (self.in_features * dtype.itemsize), self.row_step
        if self.in_features * self.out_features * dtype.itemsize <= SLICED_FROM * SLICE_BYTES:
            return [ALL]
        size = max(fit // step, 1) * step
        return [slice(start, min(start + size, self.out_features)) for start in range(0, self.out_features, size)]

    @property
    def row_step(self) -> int:
        """A slice must begin at a multiple of so many rows."""
        return 1

    def packed_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that hold the matrix, by name."""
        return {name: t for name, t in self.named_buffers(recurse=False) if name != "bias"}

    def share(self, other: "Packed") -> None:
        """Let this matrix be ``other``, of the same storage and shape: the same tensors, in memory once."""
        for name, tensor in other.packed_tensors().items():
            setattr(self, name, tensor)


class Packed4bit(Packed):
    """NF4 or FP4 in blocks of 64, the block constants themselves in 8 bit if ``double_quant``."""

    def __init__(self, storage: Storage, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__(storage, in_features, out_features, dtype, device)
        blocks = -(-in_features * out_features // storage.block_size)
        self.register_buffer("weight", torch.empty((in_features * out_features + 1) // 2, 1, dtype=torch.uint8, device=device))
        constants = torch.uint8 if storage.double_quant else torch.float32
        self.register_buffer("absmax", torch.empty(blocks, dtype=constants, device=device))
        if storage.double_quant:
            second = -(-blocks // SECOND_LEVEL_BLOCK)
            self.register_buffer("absmax_scale", torch.empty(second, dtype=torch.float32, device=device))
            self.register_buffer("absmax_offset", torch.empty((), dtype=torch.float32, device=device))
            # The 256 values that a quantised constant can take.
            self.register_buffer("absmax_code", torch.empty(256, dtype=torch.float32, device=device))
        self.share_of_constants: Share | None = None
        """Where its constants are made together with those of others."""

    @property
    def row_step(self) -> int:
        return self.storage.block_size // math.gcd(self.in_features, self.storage.block_size)

    @torch.no_grad()
    def store(self, weight: Tensor, device: torch.device | str | None = None) -> None:
        where = weight.device if device is None else device
        packed = torch.empty_like(self.weight, device=where)
        absmax = torch.empty(self.absmax.shape, dtype=torch.float32, device=where)
        for part in self.slices(weight.dtype):
            values, blocks = self._places(part)
            given = weight[part].to(where).contiguous()
            packed[values], absmax[blocks] = quantize_4bit(given, self.storage.block_size, self.storage.quant_type)
        self.weight, self.absmax = packed, absmax
        if self.storage.double_quant:
            # As bitsandbytes does it, but over the whole matrix, whatever slices it came in.
            self.absmax_offset = absmax.mean()
            self.absmax, second = bnb.quantize_blockwise(absmax - self.absmax_offset, blocksize=SECOND_LEVEL_BLOCK)
            self.absmax_scale, self.absmax_code = second.absmax, second.code

    def dense(self, dtype: torch.dtype, part: slice = ALL) -> Tensor:
        values, blocks = self._places(part)
        shape = (len(range(*part.indices(self.out_features))), self.in_features)
        return self._dequantise(_cut(self.weight, values), self._constants(blocks), shape, dtype)

    def rows(self, places: Tensor) -> Tensor:
        count = self.in_features // self.storage.block_size
        blocks = places.unsqueeze(1) * count + torch.arange(count, device=places.device)
        packed = self.weight.view(self.out_features, self.in_features // 2).index_select(0, places)
        return self._dequantise(packed, self._constants_at(blocks.view(-1)), (len(places), self.in_features), self.compute_dtype)

    def _places(self, part: slice) -> tuple[slice, slice]:
        """Return where the rows ``part`` lie: in ``weight``, two values a byte, and in ``absmax``."""
        if part == ALL:
            return ALL, ALL
        start, stop, _ = part.indices(self.out_features)
        first, last, block = start * self.in_features, stop * self.in_features, self.storage.block_size
        return slice(first // 2, (last + 1) // 2), slice(first // block, -(-last // block))

    def _dequantise(self, packed: Tensor, constants: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if packed.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        block, kind = self.storage.block_size, self.storage.quant_type
        # bitsandbytes 0.50 misreads rows on CPU that end inside a block; one row of all weights has no such end.
        cut = shape if self.in_features % block == 0 else (1, shape[0] * shape[1])
        if kind == "nf4" and packed.device.type == "cuda":
            return dense_nf4(packed, constants, block, cut, dtype).view(shape)
        return torch.ops.bitsandbytes.dequantize_4bit(packed, constants, block, kind, cut, dtype).view(shape)

    def _constants(self, blocks: slice) -> Tensor:
        """Return the largest magnitude of each of the ``blocks``, [N] float32."""
        if not self.storage.double_quant:
            return _cut(self.absmax, blocks)
        if blocks != ALL:
            return self._constants_at(torch.arange(blocks.start, blocks.stop, device=self.absmax.device))
        made = self.share_of_constants.constants(self.absmax) if self.share_of_constants else None
        return less_offset(self.absmax, self.absmax_code, self.absmax_scale).add_(self.absmax_offset) if made is None else made

    def _constants_at(self, blocks: Tensor) -> Tensor:
        """Return the constants of ``blocks`` [N], bit for bit those of ``_constants``: bitsandbytes' kernel can only begin at the first."""
        if not self.storage.double_quant:
            return self.absmax.index_select(0, blocks)
        code = self.absmax_code.index_select(0, self.absmax.index_select(0, blocks).int())
        return code.mul_(self.absmax_scale.index_select(0, blocks // SECOND_LEVEL_BLOCK)).add_(self.absmax_offset)


class Packed8bit(Packed):
    """Rows of int8 codes with one float32 scale each, the row's largest magnitude."""

    def __init__(self, storage: Storage, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__(storage, in_features, out_features, dtype, device)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32, device=device))

    @torch.no_grad()
    def store(self, weight: Tensor, device: torch.device | str | None = None) -> None:
        where = weight.device if device is None else device
        codes, scale = torch.empty_like(self.weight, device=where), torch.empty_like(self.scale, device=where)
        for part in self.slices(weight.dtype):
            # float16 is the only dtype that the kernel takes.
            codes[part], scale[part], _ = bnb.int8_vectorwise_quant(weight[part].to(where).to(torch.float16))
        self.weight, self.scale = codes, scale

    def dense(self, dtype: torch.dtype, part: slice = ALL) -> Tensor:
        return self._dequantise(self.weight[part], self.scale[part], dtype)

    def rows(self, places: Tensor) -> Tensor:
        return self._dequantise(self.weight.index_select(0, places), self.scale.index_select(0, places), self.compute_dtype)

    def _dequantise(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        # |codes| <= 127 are exact in bfloat16, so the only rounding is that of the product with the scale.
        dense, scale = codes.to(dtype), (scale / 127.0).unsqueeze(1)
        if codes.device.type != "cpu" or dtype == torch.float32:
            return dense.mul_(scale)
        # On a CPU a product of two dtypes makes float32 copies of both: of a few rows at a time, not of all.
        for rows, factors in zip(dense.split(CPU_ROWS), scale.split(CPU_ROWS), strict=True):
            rows.mul_(factors)
        return dense


class QuantLinear(Packed):
    """A frozen linear whose weight is packed. Neither pass holds more than one of its ``slices`` dense."""

    def __init__(
        self, storage: Storage, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str, bias: bool = False
    ):
        super().__init__(storage, in_features, out_features, dtype, device)
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out], in x's dtype."""
        return FrozenProduct.apply(x, self)

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T + bias for x [..., in], in x's dtype."""
        parts, rows = self.slices(x.dtype), x.reshape(-1, self.in_features)
        if parts == [ALL]:
            return _shaped(self.part_of_product(rows, ALL), x)
        y = rows.new_empty(len(rows), self.out_features)
        for part in parts:
            y[:, part] = self.part_of_product(rows, part)
        return _shaped(y, x)

    def part_of_product(self, x: Tensor, part: slice) -> Tensor:
        """Return the outputs ``part`` of ``product``."""
        return nn.functional.linear(x, self.dense(x.dtype, part), None if self.bias is None else self.bias[part])

    def product_with_grad(self, grad: Tensor) -> Tensor:
        """Return grad W for grad [..., out], in its dtype: the gradient of x. The sum over slices is float32."""
        parts = self.slices(grad.dtype)
        if parts == [ALL]:
            return grad @ self.dense(grad.dtype)
        rows = grad.reshape(-1, self.out_features)
        total = rows.new_zeros(len(rows), self.in_features, dtype=torch.float32)
        for part in parts:
            total += rows[:, part] @ self.dense(grad.dtype, part)
        return total.to(grad.dtype).view(*grad.shape[:-1], self.in_features)


class FrozenProduct(torch.autograd.Function):
    """y = x W^T + b with a gradient for x alone.

    Nothing is saved but the layer itself, and backward reads the weight from it anew: a layer whose weight is moved
    between the passes (streamed, offloaded) still gives the right gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantLinear) -> Tensor:
        dense, ctx.layer = kept_dense(layer, x.dtype), layer
        if dense is not None:
            ctx.save_for_backward(dense)
        return product(layer, x, dense)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        dense = ctx.saved_tensors
        return grad @ dense[0] if dense else ctx.layer.product_with_grad(grad), None


def kept_dense(linear: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """Return the dense weight of ``linear`` where it shall be kept for the gradient: packed, and not so large that it is cut."""
    is_kept = keeping.dense and isinstance(linear, QuantLinear) and linear.slices(dtype) == [ALL]
    return linear.dense(dtype) if is_kept else None


class Linear4bit(QuantLinear, Packed4bit):
    """A linear in NF4 or FP4; on CUDA few rows are multiplied by the packed weight as it is."""

    def product(self, x: Tensor) -> Tensor:
        whole = x.device.type == "cuda" and x.numel() <= FEW_ROWS * self.in_features and self.row_step == 1
        return self._gemm(x, ALL) if whole else super().product(x)

    def part_of_product(self, x: Tensor, part: slice) -> Tensor:
        is_fused = x.device.type == "cuda" and len(x) <= MOST_FUSED_ROWS
        return self._gemm(x, part) if is_fused else super().part_of_product(x, part)

    def _gemm(self, x: Tensor, part: slice) -> Tensor:
        """Return the outputs ``part`` in one call, which decides by x's rows and the card whether to dequantise them."""
        values, blocks = self._places(part)
        shape = (len(range(*part.indices(self.out_features))), self.in_features)
        nested = self.storage.double_quant and part == ALL
        return torch.ops.bitsandbytes.gemm_4bit(
            x,
            _cut(self.weight, values),
            shape,
            self.absmax_scale if nested else self._constants(blocks),
            self.storage.block_size,
            self.storage.quant_type,
            bias=None if self.bias is None else self.bias[part],
            absmax_8bit=self.absmax if nested else None,
            absmax_code=self.absmax_code if nested else None,
            absmax_offset=self.absmax_offset if nested else None,
        )


class Linear8bit(QuantLinear, Packed8bit):
    """LLM.int8(): on CUDA the product is int8 with outlier features kept apart, unless ``storage.int8_product`` is False."""

    def product(self, x: Tensor) -> Tensor:
        # On a CPU the int8 kernels are slower than dequantise-and-multiply, and less exact.
        return self.int8_product(x) if x.device.type == "cuda" and self.storage.int8_product else super().product(x)

    def int8_product(self, x: Tensor) -> Tensor:
        """Return x W^T + bias through int8 codes of x's rows; columns with outliers are multiplied in x's dtype."""
        rows = x.reshape(-1, self.in_features)
        codes, row_scale, outliers = bnb.int8_vectorwise_quant(rows.to(torch.float16), threshold=OUTLIER_THRESHOLD)
        args = (rows, codes, self.weight, row_scale, self.scale, outliers, self.bias)
        return _shaped(torch.ops.bitsandbytes.int8_mixed_scaled_mm(*args)[0], x)


def _cut(tensor: Tensor, part: slice) -> Tensor:
    return tensor if part == ALL else tensor[part]  # a view of all would cost the host as much as a kernel's launch


def _shaped(rows: Tensor, x: Tensor) -> Tensor:
    """Return ``rows`` [N, out], freshly made, as [..., out] for x [..., in].

    Not as a view of it, for autograd: what a function returns as one may not be written over, as the loss does with the head's output.
    """
    return torch.ops.aten._unsafe_view(rows, (*x.shape[:-1], rows.shape[-1]))


def is_linear(module: nn.Module) -> bool:
    """Return whether ``module`` is a linear layer of any storage."""
    return isinstance(module, nn.Linear | QuantLinear)


def product(linear: nn.Module, x: Tensor, dense: Tensor | None = None) -> Tensor:
    """Return what ``linear`` of any storage makes of x [..., in], unknown to autograd: [..., out], new memory.

    ``dense``: its weight, where that is at hand.
    """
    if dense is not None:
        return _shaped(nn.functional.linear(x.reshape(-1, x.shape[-1]), dense, linear.bias), x)
    return linear.product(x) if isinstance(linear, QuantLinear) else nn.functional.linear(x, linear.weight, linear.bias)


def grad_of_input(linear: nn.Module, grad: Tensor, total: Tensor | None = None, dense: Tensor | None = None) -> Tensor:
    """Return grad W for grad [N, out], [N, in]: the gradient of the input of ``linear``; added to ``total`` where that is given."""
    if dense is None and isinstance(linear, QuantLinear):
        if total is None or linear.slices(grad.dtype) != [ALL]:
            found = linear.product_with_grad(grad)
            return found if total is None else total.add_(found)
        dense = linear.dense(grad.dtype)
    weight = linear.weight if dense is None else dense
    return grad @ weight if total is None else total.addmm_(grad, weight)


def compute_dtype(linear: nn.Module) -> torch.dtype:
    """Return the dtype that ``linear`` takes and gives."""
    return linear.compute_dtype if isinstance(linear, QuantLinear) else linear.weight.dtype


@torch.no_grad()
def overwrite_weight(linear: nn.Module, weight: Tensor) -> None:
    """Put ``weight`` [out, in] into the tensors that ``linear`` has, in its storage, where they lie: whoever holds them sees it."""
    if isinstance(linear, QuantLinear):
        made = linear.storage.make(linear.in_features, linear.out_features, False, linear.compute_dtype, "meta")
        made.store(weight, linear.weight.device)
        for name, tensor in linear.packed_tensors().items():
            tensor.copy_(getattr(made, name))
    else:
        linear.weight.copy_(weight)


def store_weight(linear: nn.Module, weight: Tensor) -> None:
    """Put ``weight`` [out, in] into ``linear``, in its storage, on the device that ``weight`` lies on."""
    if isinstance(linear, QuantLinear):
        linear.store(weight)
    else:
        linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)


@torch.no_grad()
def dense_weight(linear: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight as a new dense tensor [out, in]."""
    return linear.dense(dtype) if isinstance(linear, QuantLinear) else linear.weight.detach().to(dtype, copy=True)
