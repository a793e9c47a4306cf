"""Attention that is computed once: a checkpointed block keeps what its attention gave, and the second pass takes it from there.

The second pass also keeps the weights that it makes dense, one block's at a time, for the gradient that follows.

Of all that a block computes again, attention is the dearest (its cost grows with the square of the length) and what it gives is cheap
to keep: an output of the hidden states' size, and the logarithm of a sum for each token and head, which its gradient needs.
Chen et al. 2016, arXiv:1604.06174, section 3; what is chosen here is Korthikanti et al. 2022's opposite (arXiv:2205.05198, section 5),
because a kernel that never writes the T x T scores leaves nothing large to recompute.
"""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlite.quant.keeping import dense_weights_kept


class _State(threading.local):
    mode: "_Mode | None" = None


_state = _State()


def attention_kept() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of a block's two passes, as torch's checkpointing takes them from ``context_fn``, anew for every block."""
    kept: deque[tuple[Tensor, ...]] = deque()
    return _during(_Keeping(kept)), _during(_Replaying(kept))


@contextmanager
def attending(draws: bool):
    """Enter what computes attention alone. ``draws``: it draws random numbers, so it has to be computed again, too."""
    if _state.mode is None or draws:
        yield
    else:
        with _state.mode:
            yield


@contextmanager
def _during(mode: "_Mode"):
    before, _state.mode = _state.mode, mode
    try:
        with dense_weights_kept():
            yield
    finally:
        _state.mode = before


def kept_or_computed(compute: Callable[[], Tensor]) -> Tensor:
    """Return what ``compute`` gives, all of an attention that draws nothing; or what it gave in the block's first pass, if that is kept."""
    return compute() if _state.mode is None else _state.mode.attention(compute, (), {})


class _Mode(TorchDispatchMode):
    """Sees the kernels that attention runs; those which do all of it are taken out."""

    def __init__(self, kept: deque):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _is_attention(func):
            return self.attention(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Keeping(_Mode):
    def attention(self, func, args: tuple, kwargs: dict):
        out = func(*args, **kwargs)
        # Views of their own: autograd writes its graph onto what is returned.
        self.kept.append(_views(out))
        return out


class _Replaying(_Mode):
    def attention(self, func, args: tuple, kwargs: dict):
        return _views(self.kept.popleft())


def _views(out: object) -> object:
    if isinstance(out, Tensor):
        return out.detach()
    return type(out)(map(_views, out)) if isinstance(out, tuple | list) else out


def _is_attention(func: torch._ops.OpOverload) -> bool:
    """Return whether ``func`` is one kernel for all of attention: torch's flash, efficient, cuDNN or varlen ones."""
    name = func._schema.name
    return (name.startswith("aten::_scaled_dot_product_") and "backward" not in name) or name == "torch_attn::_varlen_attn"
