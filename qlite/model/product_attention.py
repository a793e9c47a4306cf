"""Causal attention by matrix products, for CPUs with AVX-512's bfloat16: at 512 tokens torch's flash kernel takes twice as long there.

The scores are computed for a tile of queries at a time, against the keys that these may see, so of T x T scores only T times a tile's
height ever exist. Query heads that share a key head are rows of one product, and neither keys nor values are repeated for them. The
gradient computes the scores again (Dao et al. 2022, arXiv:2205.14135, section 3.1); the softmax is torch's, in float32 inside.

Keys are multiplied without the mean of the first tile's. That adds the same to all scores of a query, which a softmax does not see, and
what is left is rounded less: the scores, and the gradient of the queries, a sum of keys whose weights add up to no more than their own
rounding (Zhang et al. 2024, arXiv:2410.02367, section 4.2, which takes the mean of all; no token is to be changed by later ones).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlite.cpu_products import has_bfloat16_products
from qlite.model.kept_attention import kept_or_computed

# What transformers' SDPA would take into account beside the mask.
UNKNOWN = ("position_bias", "softcap", "cache", "is_causal")
LENGTHS = range(32, 2049)
"""Of lines and documents that products were timed to be faster for; beyond, they are as fast at best."""
LEAST_HEAD = 64
"""Width of a head below which they are slower."""
_is_traced_for_here: ContextVar[bool] = ContextVar("is_traced_for_here", default=False)
"""Whether a plan is for this CPU."""


def sdpa_or_products(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict) -> Tensor:
    """Return the attention's output [B, T, H, E], causal where ``mask`` is None: what transformers' SDPA gives, by what is fastest here.

    ``query`` [B, H, T, D], ``key`` [B, H or fewer, S, D], ``value`` [B, H or fewer, S, E]; ``options`` as transformers gives them.
    """
    if mask is None and _takes(module, query, key, options):
        return attend_by_products(query, key, value, options.get("scaling") or query.shape[-1] ** -0.5)
    return sdpa_attention_forward(module, query, key, value, mask, **options)[0]


def _takes(module: nn.Module, query: Tensor, key: Tensor, options: dict) -> bool:
    is_here = _is_traced_for_here.get() if isinstance(query, FakeTensor) else query.device.type == "cpu"
    # Where no gradient is due, an answer keeps its bits whether it is asked alone or padded beside others, which is SDPA's under a mask.
    if not is_here or not torch.is_grad_enabled() or query.dtype != torch.bfloat16 or not are_faster_here():
        return False
    length, width = query.shape[2:]
    is_plain = not options.get("dropout") and all(options.get(name) is None for name in UNKNOWN) and getattr(module, "is_causal", True)
    return is_plain and length == key.shape[2] and length in LENGTHS and width >= LEAST_HEAD


@cache
def are_faster_here() -> bool:
    """Return whether products are known to be faster than this CPU's flash kernel: timed with AVX-512, not with AMX or on ARM."""
    has_instructions, has_tiles = (getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return has_instructions and not has_tiles and has_bfloat16_products()


@contextmanager
def traced_for(where: torch.device) -> Iterator[None]:
    """Let what is traced on tensors without values compute its attention as it will on ``where``. Outside of it, as on a card."""
    token = _is_traced_for_here.set(where.type == "cpu")
    try:
        yield
    finally:
        _is_traced_for_here.reset(token)


def are_traced() -> bool:
    """Return whether a trace now has products in it, in bfloat16."""
    return _is_traced_for_here.get() and are_faster_here()


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return causal attention [B, T, H, E] of ``query`` [B, H, T, D], ``key`` [B, G, T, D], ``value`` [B, G, T, E]; H a multiple of G."""
    return _Attention.apply(query, key, value, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return kept_or_computed(lambda: _attended(query, key, value, scale))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return *_gradients(*ctx.saved_tensors, grad, ctx.scale), None


def _attended(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[-1])
    keys, values, future = _Centred(_by_head(key), query), _by_head(value), _future(query)
    for start, end in _tiles(query):
        share = _shares(_by_group(query[:, :, start:end], len(values)), keys.seen(start, end), scale, start, future)
        _put(out[:, start:end].transpose(1, 2), torch.bmm(share, values[:, :end]))
    return out


def _gradients(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, for ``grad`` [B, T, H, E] of the output."""
    keys, values, grad, future = _by_head(key), _by_head(value), grad.transpose(1, 2), _future(query)
    grad_query = torch.empty_like(query)
    # Each tile adds to them: in float32, so that nothing is rounded more than once.
    grad_keys, grad_values = (x.new_zeros(x.shape, dtype=torch.float32) for x in (keys, values))
    keys, values = _Centred(keys, query), _Centred(values, query)
    for start, end in _tiles(query):
        rows, grad_rows = (_by_group(x[:, :, start:end], len(grad_keys)) for x in (query, grad))
        seen = keys.seen(start, end)
        share = _shares(rows, seen, scale, start, future)
        grad_values[:, :end] += torch.bmm(share.transpose(1, 2), grad_rows)
        # What all shares of a row gain alike, their softmax does not see either.
        grad_scores = torch.bmm(grad_rows, values.seen(start, end).transpose(1, 2))
        torch._softmax_backward_data(grad_scores, share, -1, share.dtype, grad_input=grad_scores)
        # Of what was taken from the keys none is left here: a row of the scores' gradients adds up to zero.
        grad_keys[:, :end] += torch.bmm(grad_scores.transpose(1, 2), rows)
        _put(grad_query[:, :, start:end], torch.bmm(grad_scores, seen))
    grads = (grad_query, grad_keys.to(key.dtype).view_as(key), grad_values.to(value.dtype).view_as(value))
    return grads[0].mul_(scale), grads[1].mul_(scale), grads[2]


def _tiles(query: Tensor) -> Iterator[tuple[int, int]]:
    """Yield where each tile of queries begins and ends. As high as a head is wide: its scores are then no more numbers than the queries."""
    length, height = query.shape[2], query.shape[3]
    return ((start, min(start + height, length)) for start in range(0, length, height))


class _Centred:
    """Keys or values [N, T, D] without a mean that every query of a tile may know: the first tile's; in the first tile the first one."""

    def __init__(self, x: Tensor, query: Tensor):
        wide = torch.promote_types(x.dtype, torch.float32)
        height = next(_tiles(query))[1]
        self._of_first = x[:, :height] - x[:, :1]
        # Computed in float32 and rounded once, without a float32 copy of all.
        mean = x[:, :height].mean(dim=1, keepdim=True, dtype=wide)
        self._of_others = torch.sub(x, mean, out=torch.empty_like(x)) if height < x.shape[1] else None

    def seen(self, start: int, end: int) -> Tensor:
        """Return those up to ``end``, for the tile of queries that begins at ``start``."""
        return self._of_others[:, :end] if start else self._of_first


def _shares(rows: Tensor, keys: Tensor, scale: float, start: int, future: Tensor) -> Tensor:
    """Return what each of ``rows`` [N, G * tile, D], the queries from ``start`` on, takes of each of ``keys`` [N, end, D]: shares of 1."""
    end = keys.shape[1]
    height = end - start
    # With beta = 0 the first argument gives its shape alone.
    scores = torch.baddbmm(rows.new_empty(1).expand(*rows.shape[:2], end), rows, keys.transpose(1, 2), beta=0, alpha=scale)
    scores.view(len(rows), -1, height, end)[..., start:].masked_fill_(future[:height, :height], float("-inf"))
    return torch.softmax(scores, -1, out=scores)


def _future(query: Tensor) -> Tensor:
    """Return which keys of its own tile a query does not see, [tile, tile] bool."""
    height = next(_tiles(query))[1]
    return torch.ones(height, height, dtype=torch.bool, device=query.device).triu(1)


def _by_head(x: Tensor) -> Tensor:
    """Return ``x`` [B, G, T, D] as [B * G, T, D], row after row."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def _by_group(x: Tensor, count: int) -> Tensor:
    """Return ``x`` [B, H, tile, D] with the query heads of one key head one below the other: [``count``, rows, D]."""
    return x.reshape(count, -1, x.shape[-1])


def _put(place: Tensor, rows: Tensor) -> None:
    """Write ``rows`` [B * G, rows, D] to ``place`` [B, H, tile, D]."""
    place.copy_(rows.view(place.shape))
