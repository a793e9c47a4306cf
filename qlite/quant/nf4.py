"""bitsandbytes' NF4 codes, bit for bit, from one compiled pass over the weights: on a CPU its own takes 30 times as long (tools/LOG.md)."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from qlite.compiling import compiled

_quick: dict[torch.dtype, Callable] = {}


def compile_quantiser(dtype: torch.dtype) -> None:
    """Let weights of ``dtype`` be quantised on a CPU by a compiled function from now on; without a compiler bitsandbytes does it."""

    def examples() -> dict[str, tuple[Tensor]]:
        # As many rows as a layer has: by them the compiler decides what is worth a thread.
        return {"codes": (torch.randn(2**14, 64, generator=torch.Generator().manual_seed(0)).to(dtype),)}

    try:
        _quick[dtype] = compiled({"codes": _codes}, examples, Path(__file__), torch.device("cpu"), dtype)["codes"]
    except Exception:  # a compiler can be missing in many ways
        _quick.pop(dtype, None)


def quantize_4bit(weight: Tensor, block_size: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Return the codes of ``weight`` [...], two a byte, [N, 1] uint8, and each block's largest magnitude, [blocks] float32.

    Dettmers et al. 2023, arXiv:2305.14314, section 3; of finite weights the same bits as bitsandbytes' quantize_4bit on that device.
    """
    if weight.device.type == "cpu" and quant_type == "nf4":
        return _quantize_nf4(weight, block_size)
    return torch.ops.bitsandbytes.quantize_4bit(weight, block_size, quant_type, torch.uint8)


@torch.library.custom_op("qlite::quantize_nf4", mutates_args=())  # a plan sees one op, as it does of bitsandbytes'
def _quantize_nf4(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    quick = _quick.get(weight.dtype)
    if quick is None or weight.numel() % block_size:
        return torch.ops.bitsandbytes.quantize_4bit(weight, block_size, "nf4", torch.uint8)
    codes, largest = quick(weight.reshape(-1, block_size).contiguous())
    pairs = codes.view(torch.int16)  # the first of two codes in the low byte
    packed = pairs.bitwise_left_shift(4).bitwise_or_(pairs.bitwise_right_shift(8)).bitwise_and_(0xFF)
    return packed.to(torch.uint8).view(-1, 1), largest


@_quantize_nf4.register_fake
def _(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return torch.ops.bitsandbytes.quantize_4bit(weight, block_size, "nf4", torch.uint8)


def _codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return each value's code, uint8, and each row's largest magnitude, float32, of ``weight`` [blocks, values]."""
    values = weight.float()
    largest = values.abs().amax(-1)
    scaled = values * (1.0 / largest.clamp(min=1e-38)).unsqueeze(-1)
    # How many of the middles between two levels it exceeds. Counted in float32: so the compiler keeps to one width of vectors.
    codes = sum((scaled > middle).float() for middle in _MIDDLES)
    return codes.to(torch.uint8), largest


_MIDDLES = [((low + high) / 2).item() for low, high in pairwise(bnb.get_4bit_type("nf4", "cpu"))]
