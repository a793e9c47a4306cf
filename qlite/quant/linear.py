"""How a frozen linear layer stores its weight: the only module that knows.

Everything else calls a base linear as ``y = base(x)`` and asks here for its shape, its compute dtype or its dense
weight. The 4- and 8-bit formats and their kernels are bitsandbytes' (Dettmers et al. 2023, arXiv:2305.14314, section 3;
Dettmers et al. 2022, arXiv:2208.07339, section 3); the layers and the autograd function are our own, because
bitsandbytes' modules move and repack their weights during use and its autograd function keeps them on ``ctx``.
"""

from dataclasses import dataclass
from typing import Literal

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Double quantisation groups 256 block constants under one second-level constant (arXiv:2305.14314, section 3).
SECOND_LEVEL_BLOCK = 256
# Activations at least this large stay out of the int8 product (arXiv:2208.07339, section 3.2).
OUTLIER_THRESHOLD = 6.0


@dataclass(frozen=True)
class Storage:
    """How every frozen linear of a model is stored."""

    bits: Literal[4, 8, 16]
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    block_size: int = 64

    def make(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
        """Return an empty frozen linear [out_features, in_features] of this storage; ``store_weight`` fills it."""
        if self.bits == 16:
            return nn.Linear(in_features, out_features, bias, device=device, dtype=dtype).requires_grad_(False)
        if self.bits == 8:
            return Linear8bit(in_features, out_features, bias, dtype, device)
        return Linear4bit(in_features, out_features, bias, dtype, device, self)


class QuantLinear(nn.Module):
    """A frozen linear whose weight is packed. Its tensors are buffers: no optimizer and no ``.grad`` ever sees them."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, dtype
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def store(self, weight: Tensor) -> None:
        """Quantise ``weight`` [out, in], any float dtype, on the device it lies on."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as a new dense tensor [out, in]."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T + bias for x [..., in], in x's dtype."""
        return nn.functional.linear(x, self.dense(x.dtype), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out], in x's dtype."""
        return FrozenProduct.apply(x, self)


class FrozenProduct(torch.autograd.Function):
    """y = x W^T + b with a gradient for x alone.

    Nothing is saved but the layer itself, and backward reads the weight from it anew: a layer whose weight is moved
    between the passes (streamed, offloaded) still gives the right gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dense(grad.dtype), None


class Linear4bit(QuantLinear):
    """NF4 or FP4 in blocks of 64, the block constants themselves in 8 bit if ``double_quant``."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device, storage: Storage):
        super().__init__(in_features, out_features, bias, dtype, device)
        self.storage = storage
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

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        packed, state = bnb.quantize_4bit(
            weight.contiguous(),
            blocksize=self.storage.block_size,
            compress_statistics=self.storage.double_quant,
            quant_type=self.storage.quant_type,
        )
        self.weight, self.absmax = packed, state.absmax
        if self.storage.double_quant:
            self.absmax_scale, self.absmax_offset = state.state2.absmax, state.offset
            self.absmax_code = state.state2.code

    def dense(self, dtype: torch.dtype) -> Tensor:
        shape = (self.out_features, self.in_features)
        if self.weight.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        # bitsandbytes 0.50 misreads rows on CPU that end inside a block; one row of all weights has no such end.
        cut = shape if self.in_features % self.storage.block_size == 0 else (1, self.in_features * self.out_features)
        args = (self.weight, self._constants(), self.storage.block_size, self.storage.quant_type, cut, dtype)
        return torch.ops.bitsandbytes.dequantize_4bit(*args).view(shape)

    def _constants(self) -> Tensor:
        """Return the largest magnitude of each block, [blocks] float32."""
        if not self.storage.double_quant:
            return self.absmax
        args = (self.absmax, self.absmax_scale, self.absmax_code, SECOND_LEVEL_BLOCK, torch.float32)
        return torch.ops.bitsandbytes.dequantize_blockwise(*args) + self.absmax_offset

    def product(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return super().product(x)
        # One call that reads the packed weight directly where x has few rows (decoding).
        nested = self.storage.double_quant
        return torch.ops.bitsandbytes.gemm_4bit(
            x,
            self.weight,
            (self.out_features, self.in_features),
            self.absmax_scale if nested else self.absmax,
            self.storage.block_size,
            self.storage.quant_type,
            bias=self.bias,
            absmax_8bit=self.absmax if nested else None,
            absmax_code=self.absmax_code if nested else None,
            absmax_offset=self.absmax_offset if nested else None,
        )


class Linear8bit(QuantLinear):
    """LLM.int8(): int8 rows with one float32 scale each; on CUDA the product is int8 with outlier features kept apart."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device):
        super().__init__(in_features, out_features, bias, dtype, device)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32, device=device))

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        # float16 is the only dtype that the kernel takes.
        self.weight, self.scale, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))

    def dense(self, dtype: torch.dtype) -> Tensor:
        # |codes| <= 127 are exact in bfloat16, so the only rounding is that of the product with the scale.
        return self.weight.to(dtype).mul_((self.scale / 127.0).unsqueeze(1))

    def product(self, x: Tensor) -> Tensor:
        # On a CPU the int8 kernels are slower than dequantise-and-multiply, and less exact.
        return self.int8_product(x) if x.device.type == "cuda" else super().product(x)

    def int8_product(self, x: Tensor) -> Tensor:
        """Return x W^T + bias through int8 codes of x's rows; columns with outliers are multiplied in x's dtype."""
        rows = x.reshape(-1, self.in_features)
        codes, row_scale, outliers = bnb.int8_vectorwise_quant(rows.to(torch.float16), threshold=OUTLIER_THRESHOLD)
        args = (rows, codes, self.weight, row_scale, self.scale, outliers, self.bias)
        return torch.ops.bitsandbytes.int8_mixed_scaled_mm(*args)[0].reshape(*x.shape[:-1], self.out_features)


def is_linear(module: nn.Module) -> bool:
    """Return whether ``module`` is a linear layer of any storage."""
    return isinstance(module, nn.Linear | QuantLinear)


def compute_dtype(linear: nn.Module) -> torch.dtype:
    """Return the dtype that ``linear`` takes and gives."""
    return linear.compute_dtype if isinstance(linear, QuantLinear) else linear.weight.dtype


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
