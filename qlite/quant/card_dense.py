"""NF4 weights made dense on a card by a kernel in Triton: bitsandbytes' bits, in two thirds of its time (tools/LOG.md, "Kernels by hand").

What Triton cannot do, or not to the bit, bitsandbytes does.
"""

from collections.abc import Sequence
from functools import cache

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from qlite import device as machine
from qlite.compiling import keep_triton_code

_exact: dict[tuple[torch.device, int], bool] = {}
_LIBRARY = torch.library.Library("qlite", "FRAGMENT")
_LIBRARY.define("dequantize_nf4(Tensor packed, Tensor constants, int block_size, int[] shape, ScalarType dtype) -> Tensor")


def dense_nf4(packed: Tensor, constants: Tensor, block_size: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the weights of ``packed`` codes [N, 1] uint8, two a byte, times each block's constant [blocks] float32: ``shape``, ``dtype``.

    Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """
    return torch.ops.qlite.dequantize_nf4.default(packed, constants, block_size, shape, dtype)


@torch.library.register_fake("qlite::dequantize_nf4", lib=_LIBRARY)
def _fake(packed: Tensor, _constants: Tensor, _block_size: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def _dense_nf4(packed: Tensor, constants: Tensor, block_size: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if constants.numel() * block_size == 2 * packed.numel() and _is_exact(packed.device, block_size):
        return _by_triton(packed, constants, block_size, shape, dtype)
    return _by_bitsandbytes(packed, constants, block_size, shape, dtype)


_LIBRARY.impl("dequantize_nf4", _dense_nf4, "CompositeExplicitAutograd")


def _by_bitsandbytes(packed: Tensor, constants: Tensor, block_size: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.ops.bitsandbytes.dequantize_4bit.default(packed, constants, block_size, "nf4", shape, dtype)


def _by_triton(packed: Tensor, constants: Tensor, block_size: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    from qlite import card_kernels

    out = packed.new_empty(shape, dtype=dtype)
    card_kernels.dense_nf4(packed, constants, _levels(packed.device), block_size, out)
    return out


@cache
def _levels(device: torch.device) -> Tensor:
    """Return NF4's sixteen values, float32."""
    with _disable_current_modes():
        return bnb.get_4bit_type("nf4", device)


def _is_exact(device: torch.device, block_size: int) -> bool:
    """Return whether the kernel runs on ``device`` and gives bitsandbytes' bits there; asked once."""
    if device.type != "cuda" or not machine.is_current(device):
        return False
    if (device, block_size) not in _exact:
        try:
            _exact[device, block_size] = _gives_its_bits(device, block_size)
        except torch.OutOfMemoryError:  # says nothing of the kernel
            return False
        except Exception:  # no Triton, no compiler, or a card that it does not know
            _exact[device, block_size] = False
    return _exact[device, block_size]


def _gives_its_bits(device: torch.device, block_size: int) -> bool:
    keep_triton_code()
    with _disable_current_modes():
        chance, blocks = torch.Generator(device).manual_seed(0), 77
        packed = torch.randint(256, (blocks * block_size // 2, 1), dtype=torch.uint8, device=device, generator=chance)
        args = packed, torch.rand(blocks, device=device, generator=chance), block_size, (blocks, block_size)
        types = torch.bfloat16, torch.float16, torch.float32
        return all(torch.equal(_by_triton(*args, dtype), _by_bitsandbytes(*args, dtype)) for dtype in types)
