"""Training bfloat16 parameters without losing small updates: one flat buffer, an exact float32 master in 2 more bytes.

A bfloat16 weight cannot take an update smaller than half its last digit (2^-9 of its size), and at the end of a
decaying schedule nearly every update is smaller. The cure is a float32 master copy. Rounded to nearest, bfloat16 is the
upper half of a float32, so master = weight and a signed 16-bit remainder: the pair is the master, bit for bit, and
costs 2 bytes per parameter instead of 4. The float32 values exist only while the optimizer steps.
Measured against plain bfloat16, stochastic rounding and Kahan summation in tools/LOG.md.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

CHUNK = 1 << 22


def split_float32(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return (bfloat16 nearest to ``master``, int16 remainder): ``join_float32`` gives the float32 back exactly."""
    bits = master.view(torch.int32)
    remainder = bits.to(torch.int16)  # keeps the lower 16 bits, read as a signed number: -32768 .. 32767
    upper = ((bits - remainder.to(torch.int32)) >> 16).to(torch.int16)
    return upper.view(torch.bfloat16), remainder


def join_float32(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 tensor that ``split_float32`` took apart."""
    upper = weight.view(torch.int16).to(torch.int32) << 16
    return (upper + remainder.to(torch.int32)).view(torch.float32)


def put_float32(master: Tensor, weight: Tensor, remainder: Tensor | None) -> None:
    """Write ``master`` into ``weight`` and ``remainder``, both of its shape; without a remainder the weight is float32 itself."""
    if remainder is None:
        weight.copy_(master)
        return
    upper, lower = split_float32(master)
    weight.copy_(upper)
    remainder.copy_(lower)


class FlatParameters:
    """All trainable tensors of one optimizer group and dtype, as views into one flat buffer of N elements.

    ``master`` is the float32 parameter that the optimizer sees; between steps it is empty. Gradients are summed in
    float32 as they arrive: a step of 32 micro-batches summed in bfloat16 would lose the small ones.
    """

    def __init__(self, params: list[nn.Parameter]):
        first = params[0]
        self.params, self.size = params, sum(p.numel() for p in params)
        self.weight = torch.empty(self.size, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros(self.size, dtype=torch.float32, device=first.device)
        self.remainder = torch.zeros(self.size, dtype=torch.int16, device=first.device) if first.dtype == torch.bfloat16 else None
        self.master = nn.Parameter(torch.empty(0, dtype=torch.float32, device=first.device))
        for p, view, total in zip(params, self._views(self.weight), self._views(self.grad), strict=True):
            view.copy_(p.data)
            p.data = view
            p.register_post_accumulate_grad_hook(_adder(total))

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield (parameter, its part of ``grad`` as a view of its shape)."""
        return zip(self.params, self._views(self.grad), strict=True)

    def saved(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs beside the parameters, by name."""
        return {} if self.remainder is None else {"remainder": self.remainder}

    def load(self, saved: dict[str, Tensor]) -> None:
        """Take over what ``saved`` returned."""
        if self.remainder is not None:
            self.remainder.copy_(saved["remainder"])

    def place(self, param: nn.Parameter) -> slice:
        """Return where ``param``'s numbers are in the flat buffers."""
        start = 0
        for each in self.params:
            if each is param:
                return slice(start, start + param.numel())
            start += each.numel()
        raise KeyError("no parameter of this buffer")

    @torch.no_grad()
    def write(self, param: nn.Parameter, value: Tensor) -> None:
        """Let ``param`` and its master be ``value`` [of its shape], float32, exactly."""
        remainder = None if self.remainder is None else self.remainder[self.place(param)].view(param.shape)
        put_float32(value.to(self.grad.device, torch.float32).contiguous(), param, remainder)

    @torch.no_grad()
    def open(self) -> None:
        """Give ``master`` its float32 values and gradient for one optimizer step."""
        if self.remainder is None:
            self.master.data = self.weight
        else:
            self.master.data = torch.empty_like(self.grad)
            for master, weight, remainder in self._chunks():
                master.copy_(join_float32(weight, remainder))
        self.master.grad = self.grad

    @torch.no_grad()
    def close(self, decay: float = 0.0) -> None:
        """Write the stepped ``master`` back into the parameters, set it empty, and zero the gradient sum.

        ``decay``: the share by which the step shrinks a weight; the optimizer has done that to ``master``.
        """
        if self.remainder is not None:
            for master, weight, remainder in self._chunks():
                put_float32(master, weight, remainder)
        self.drop()
        self.grad.zero_()

    @torch.no_grad()
    def drop(self) -> None:
        """Set ``master`` empty, with what has been done to it; a float32 parameter itself keeps it."""
        self.master.grad = None
        self.master.data = self.grad.new_empty(0)

    def forget(self) -> None:
        """Drop what has been summed since the last step, and what a backward pass that failed has left."""
        self.grad.zero_()
        for param in self.params:
            param.grad = None

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Return ``flat`` [N] as a view of each parameter's shape."""
        parts = flat.split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield matching parts of master, weight and remainder: the conversions' temporaries are as large as one part."""
        return zip(*(t.split(CHUNK) for t in (self.master.data, self.weight, self.remainder)), strict=True)


def _adder(total: Tensor):
    def add(param: nn.Parameter) -> None:
        total.add_(param.grad)
        param.grad = None

    return add
