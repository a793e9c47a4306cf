"""Functions whose gradient is one kernel on every device, but that tensors without values take apart into several.

torch has no rule for these gradients on its meta device and falls back to their definition, with temporaries that nothing real has.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class WholeKernels(TorchFunctionMode):
    """Keeps such functions whole. For tensors without values alone: what they return has none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _ELEMENTWISE:
            return _Elementwise.apply(args[0])
        return func(*args, **(kwargs or {}))


class _Elementwise(torch.autograd.Function):
    """A function of each element, whose gradient needs its input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.empty_like(x) if grad is not None else None


_ELEMENTWISE = {functional.silu, functional.mish}
