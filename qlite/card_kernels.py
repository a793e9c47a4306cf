"""The kernels that are written for cards, in Triton: elementwise work, the loss of given logits, NF4 weights made dense.

What torch's compiler writes for sizes that it is not to know moves two bytes at a time: on an H200 it had a twentieth to a half of the
memory's rate, and bitsandbytes' dequantisation half of it (tools/LOG.md, "Kernels by hand"). Here the sizes of a row are known, and
other numbers that 16 divides are seen to be so: eight or sixteen bytes are moved at a time. Each takes and gives what the function of its
name does in model/elementwise.py. Whoever imports this needs Triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 2048
"""Of one program, where a row has no more."""
VALUES_OF_A_WARP = 512
MOST_WARPS = 16
LOGITS = 4096
"""Of one row that are looked at together."""
CODES = 4096
"""Of one program."""
_VALUES = tl.constexpr(VALUES)


def norm_rows(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """Return RMSNorm of the rows of x [N, D]."""
    out = torch.empty_like(x)
    _norm[_grid_of_rows(x)](x, weight, eps, out, len(x), **_row(x.shape[1]))
    return out


def norm_rows_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """Return the gradient of x [N, D]."""
    out = torch.empty_like(x)
    _norm_backward[_grid_of_rows(x)](grad, x, weight, eps, out, len(x), **_row(x.shape[1]))
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return SiLU(gate) * up, [N]."""
    out = torch.empty_like(gate)
    _gated[(triton.cdiv(len(gate), VALUES),)](gate, up, out, len(gate), **_flat())
    return out


def gated_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> None:
    """Turn gate and up, [N], into their gradients."""
    _gated_backward[(triton.cdiv(len(gate), VALUES),)](gate, up, grad, len(gate), **_flat())


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [N, H, D], each vector turned by its row's angles, [N, 1, D]."""
    return _turned_by(x, cos, sin, False)


def turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of ``turned``."""
    return _turned_by(x, cos, sin, True)


def losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p(target) and the log of the exponentials' sum of each row of logits [N, V], [N] float32."""
    rows, size = logits.shape
    found, log_sums = logits.new_empty(2, rows, dtype=torch.float32)
    _losses[(rows,)](logits, targets, found, log_sums, size, **_vocabulary())
    return found, log_sums


def turned_into_grad_(logits: Tensor, targets: Tensor, log_sums: Tensor, denominator: Tensor) -> None:
    """Turn logits [N, V] into the gradient of the sum of their losses over ``denominator``."""
    rows, size = logits.shape
    grid = rows, triton.cdiv(size, LOGITS)
    _turned_into_grad[grid](logits, targets, log_sums, denominator, size, **_vocabulary())


def dense_nf4(packed: Tensor, constants: Tensor, levels: Tensor, block_size: int, out: Tensor) -> None:
    """Fill ``out`` with the weights of ``packed`` codes, two a byte, times each block's constant [blocks]; ``levels``: NF4's sixteen."""
    sizes = _codes(block_size)
    _dense_nf4[(triton.cdiv(len(constants), sizes["TOGETHER"]),)](packed, constants, levels, out, len(constants), **sizes)


def _turned_by(x: Tensor, cos: Tensor, sin: Tensor, is_back: bool) -> Tensor:
    rows, heads, size = x.shape
    out, sizes = torch.empty_like(x), _heads(heads, size)
    _turned[(rows, triton.cdiv(heads, sizes["TOGETHER"]))](x, cos, sin, out, heads, **sizes, IS_BACK=is_back)
    return out


# How each kernel shares its work out


def _flat() -> dict[str, int]:
    return {"VALUES": VALUES, "num_warps": _warps(VALUES)}


def _vocabulary() -> dict[str, int]:
    return {"LOGITS": LOGITS, "num_warps": _warps(LOGITS)}


def _codes(block_size: int) -> dict[str, int]:
    return {"HALF": block_size // 2, "TOGETHER": max(1, CODES // block_size), "num_warps": CODES // 1024}


def _heads(heads: int, size: int) -> dict[str, int]:
    half = triton.next_power_of_2(size // 2)
    together = min(triton.next_power_of_2(heads), max(1, VALUES // 2 // half))
    # Four numbers a thread and half, eight bytes: a tenth faster than eight.
    return {"HALF": size // 2, "TOGETHER": together, "num_warps": _warps(4 * together * half)}


def _grid_of_rows(x: Tensor) -> tuple[int]:
    """Return how many programs share the rows of x: each has one, or as many as have ``VALUES`` numbers."""
    return (triton.cdiv(len(x), max(1, VALUES // triton.next_power_of_2(x.shape[1]))),)


def _row(size: int) -> dict[str, int]:
    padded = triton.next_power_of_2(size)
    return {"SIZE": size, "PADDED": padded, "num_warps": _warps(max(padded, VALUES))}


def _warps(values: int) -> int:
    return min(MOST_WARPS, max(1, values // VALUES_OF_A_WARP))


# What is only counted up to is not worth machine code of its own for each kind of number.
@triton.jit(do_not_specialize=["rows"])
def _norm(x, weight, eps, out, rows, SIZE: tl.constexpr, PADDED: tl.constexpr):
    ROWS: tl.constexpr = 1 if PADDED > _VALUES else _VALUES // PADDED
    row, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    place, inside = row.to(tl.int64) * SIZE + at, (row < rows) & (at < SIZE)
    values = tl.load(x + place, inside, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 1, keep_dims=True) / SIZE + tl.load(eps))
    # Rounded before the weight is multiplied, as the families' own code does.
    unit = (values * inverse).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + place, unit * tl.load(weight + at, at < SIZE, 0.0).to(tl.float32), inside)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward(grad, x, weight, eps, out, rows, SIZE: tl.constexpr, PADDED: tl.constexpr):
    ROWS: tl.constexpr = 1 if PADDED > _VALUES else _VALUES // PADDED
    row, at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    place, inside = row.to(tl.int64) * SIZE + at, (row < rows) & (at < SIZE)
    values = tl.load(x + place, inside, 0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 1, keep_dims=True) / SIZE + tl.load(eps))
    unit = values * inverse
    grad_unit = tl.load(grad + place, inside, 0.0).to(tl.float32) * tl.load(weight + at, at < SIZE, 0.0).to(tl.float32)
    share = tl.sum(grad_unit * unit, 1, keep_dims=True) / SIZE
    tl.store(out + place, (grad_unit - unit * share) * inverse, inside)


@triton.jit
def _gated(gate, up, out, count, VALUES: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    inside = place < count
    x = tl.load(gate + place, inside, 0.0).to(tl.float32)
    tl.store(out + place, x * tl.sigmoid(x) * tl.load(up + place, inside, 0.0).to(tl.float32), inside)


@triton.jit
def _gated_backward(gate, up, grad, count, VALUES: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    inside = place < count
    x = tl.load(gate + place, inside, 0.0).to(tl.float32)
    factor = tl.load(up + place, inside, 0.0).to(tl.float32)
    of_out = tl.load(grad + place, inside, 0.0).to(tl.float32)
    share = tl.sigmoid(x)
    tl.store(gate + place, of_out * factor * share * (1 + x * (1 - share)), inside)
    tl.store(up + place, of_out * x * share, inside)


@triton.jit(do_not_specialize=["heads"])
def _turned(x, cos, sin, out, heads, HALF: tl.constexpr, TOGETHER: tl.constexpr, IS_BACK: tl.constexpr):
    PADDED: tl.constexpr = triton.next_power_of_2(HALF)
    row = tl.program_id(0).to(tl.int64)
    head, at = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)[:, None], tl.arange(0, PADDED)[None, :]
    place, inside = (row * heads + head) * (2 * HALF) + at, (head < heads) & (at < HALF)
    first = tl.load(x + place, inside, 0.0).to(tl.float32)
    second = tl.load(x + place + HALF, inside, 0.0).to(tl.float32)
    angle = row * (2 * HALF) + at
    cos1 = tl.load(cos + angle, at < HALF, 0.0).to(tl.float32)
    cos2 = tl.load(cos + angle + HALF, at < HALF, 0.0).to(tl.float32)
    sin1 = tl.load(sin + angle, at < HALF, 0.0).to(tl.float32)
    sin2 = tl.load(sin + angle + HALF, at < HALF, 0.0).to(tl.float32)
    if IS_BACK:
        tl.store(out + place, first * cos1 + second * sin2, inside)
        tl.store(out + place + HALF, second * cos2 - first * sin1, inside)
    else:
        tl.store(out + place, first * cos1 - second * sin1, inside)
        tl.store(out + place + HALF, second * cos2 + first * sin2, inside)


@triton.jit
def _losses(logits, targets, losses, log_sums, size, LOGITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * size
    # One pass: what was summed so far is rescaled where a larger one comes. Finite, or the first would be taken from itself.
    most, total = -3.0e38, 0.0
    for start in range(0, size, LOGITS):
        at = start + tl.arange(0, LOGITS)
        values = tl.load(begin + at, at < size, -float("inf")).to(tl.float32)
        larger = tl.maximum(most, tl.max(values))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(values - larger))
        most = larger
    log_sum = tl.log(total) + most
    right = tl.load(begin + tl.load(targets + row)).to(tl.float32)
    tl.store(losses + row, log_sum - right)
    tl.store(log_sums + row, log_sum)


@triton.jit
def _turned_into_grad(logits, targets, log_sums, denominator, size, LOGITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * LOGITS + tl.arange(0, LOGITS)
    place = logits + row * size + at
    share = tl.exp(tl.load(place, at < size, 0.0).to(tl.float32) - tl.load(log_sums + row))
    is_right = (at == tl.load(targets + row)).to(tl.float32)
    tl.store(place, (share - is_right) / tl.load(denominator), at < size)


@triton.jit(do_not_specialize=["blocks"])
def _dense_nf4(packed, constants, levels, out, blocks, HALF: tl.constexpr, TOGETHER: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)[:, None]
    pairs = tl.load(packed + block * HALF + tl.arange(0, HALF)[None, :], block < blocks, 0)
    constant = tl.load(constants + block, block < blocks, 0.0)
    # The first of two is the higher half of their byte.
    first, second = tl.load(levels + (pairs >> 4)) * constant, tl.load(levels + (pairs & 15)) * constant
    tl.store(out + block * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :], tl.interleave(first, second), block < blocks)
