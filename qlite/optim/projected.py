"""Gradients, their sums and the optimizer's state in a low-rank space, for matrices trained whole.   Zhao et al. 2024, arXiv:2403.03507.

The gradient G [m, n] of a matrix is seen through P, whose R rows are G's top singular directions on its shorter side: P G [R, n] or
G P^T [m, R] (section 3.2). The optimizer steps a master of that shape; what it has done there is scaled, projected back and added to the
weight (algorithm 2). As each gradient arrives it is projected, summed and dropped: no micro-batch leaves one of the weight's size behind,
while the authors' code sums them all. P is made anew every ``update_every`` steps of the first gradient after them; the
optimizer's moments stay as they are, as in the authors' code (github.com/jiaweizzhao/GaLore).
"""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn

from qlite.optim.flat import CHUNK, join_float32, put_float32


class ProjectedParameters:
    """Matrices of one optimizer group, trained through projections of rank R; it stands where ``FlatParameters`` does.

    Between steps ``master`` is empty. While the optimizer steps it is zeros of the projections' N elements, which become the step.
    """

    def __init__(self, params: list[nn.Parameter], rank: int, update_every: int, scale: float):
        first = params[0]
        self.params, self.update_every, self.scale = params, update_every, scale
        self.low_shapes = [_low_shape(p.shape, rank) for p in params]
        self.basis_shapes = [(rank, min(p.shape)) for p in params]
        self.size = sum(map(prod, self.low_shapes))
        self.grad = torch.zeros(self.size, dtype=torch.float32, device=first.device)
        # In the weights' dtype, in which the products with the gradients are computed.
        self.bases = torch.zeros(sum(map(prod, self.basis_shapes)), dtype=first.dtype, device=first.device)
        is_short = first.dtype == torch.bfloat16
        self.remainder = torch.zeros(sum(p.numel() for p in params), dtype=torch.int16, device=first.device) if is_short else None
        self.master = nn.Parameter(torch.empty(0, dtype=torch.float32, device=first.device))
        self.steps = 0
        self._made: set[int] = set()
        """The matrices whose projection this step has made."""
        self._closed = 0
        """Pieces of the weights that a ``close`` under way has moved: one that ran out of memory goes on behind them."""
        for index, p in enumerate(params):
            p.register_post_accumulate_grad_hook(self._adder(index))

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield (parameter, its part of ``grad`` as a view of its projection's shape)."""
        return zip(self.params, _views(self.grad, self.low_shapes), strict=True)

    def saved(self) -> dict[str, Tensor | int]:
        """Return what a checkpoint needs beside the parameters, by name."""
        remainder = {} if self.remainder is None else {"remainder": self.remainder}
        return {**remainder, "bases": self.bases, "steps": self.steps}

    def load(self, saved: dict[str, Tensor | int]) -> None:
        """Take over what ``saved`` returned."""
        if self.remainder is not None:
            self.remainder.copy_(saved["remainder"])
        self.bases.copy_(saved["bases"])
        self.steps = saved["steps"]

    @torch.no_grad()
    def open(self) -> None:
        """Let ``master`` be zeros, with the gradient's sum, for one optimizer step."""
        self.master.data = torch.zeros_like(self.grad)
        self.master.grad = self.grad

    @torch.no_grad()
    def close(self, decay: float) -> None:
        """Add what the optimizer has made of ``master`` to the weights, shrunk by their share ``decay`` then; zero the gradients' sum."""
        for number, (low, basis, weight, remainder) in enumerate(self._pieces()):
            if number < self._closed:
                continue
            wide = weight if remainder is None else join_float32(weight, remainder)
            put_float32(torch.addmm(wide, low, basis.float(), alpha=self.scale).mul_(1 - decay), weight, remainder)
            self._closed = number + 1
        self.drop()
        self.forget()
        self._closed = 0
        self.steps += 1

    @torch.no_grad()
    def drop(self) -> None:
        """Set ``master`` empty, with what has been done to it."""
        self.master.grad = None
        self.master.data = self.grad.new_empty(0)

    def forget(self) -> None:
        """Drop the sum of gradients, and make a projection that was due again of the next gradient."""
        self.grad.zero_()
        self._made.clear()
        for p in self.params:
            p.grad = None

    def _adder(self, index: int):
        def add(param: nn.Parameter) -> None:
            gradient, param.grad = param.grad, None
            self._add(index, gradient)

        return add

    @torch.no_grad()
    def _add(self, index: int, gradient: Tensor) -> None:
        basis = _views(self.bases, self.basis_shapes)[index]
        if self.steps % self.update_every == 0 and index not in self._made:
            basis.copy_(top_directions(gradient, len(basis)))
            self._made.add(index)
        total = _views(self.grad, self.low_shapes)[index]
        total.add_(gradient @ basis.T if _is_tall(gradient.shape) else basis @ gradient)

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Yield (a, b, weight, remainder): a @ b is what some rows of a weight have to take; float32 copies are as large as one piece."""
        lows, bases = _views(self.master.data, self.low_shapes), _views(self.bases, self.basis_shapes)
        shapes = [p.shape for p in self.params]
        remainders = [None] * len(shapes) if self.remainder is None else _views(self.remainder, shapes)
        for p, low, basis, remainder in zip(self.params, lows, bases, remainders, strict=True):
            left, right = (low, basis) if _is_tall(p.shape) else (basis.T.float(), low)
            rows = max(1, CHUNK // p.shape[1])
            parts = [None] * -(-len(p) // rows) if remainder is None else remainder.split(rows)
            for a, weight, part in zip(left.split(rows), p.data.split(rows), parts, strict=True):
                yield a, right, weight, part


def top_directions(gradient: Tensor, rank: int) -> Tensor:
    """Return the ``rank`` top singular directions of ``gradient`` [m, n] on its shorter side, as rows [R, min(m, n)], in float64.

    They are the eigenvectors of G^T G or G G^T, each with its largest element positive: the same whatever machine finds them. float64,
    for the product squares what separates two directions.
    """
    # What is not finite must not end here: the step is skipped for the norm that it gives the sum.
    wide = torch.nan_to_num(gradient).double()
    products = wide.T @ wide if _is_tall(gradient.shape) else wide @ wide.T
    found = torch.linalg.eigh(products).eigenvectors[:, -rank:].flip(1).T
    largest = found.gather(1, found.abs().argmax(dim=1, keepdim=True))
    return found * largest.sign()


def _is_tall(shape: tuple[int, ...]) -> bool:
    return shape[0] >= shape[1]


def _low_shape(shape: tuple[int, ...], rank: int) -> tuple[int, int]:
    return (shape[0], rank) if _is_tall(shape) else (rank, shape[1])


def _views(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(flat.split(list(map(prod, shapes))), shapes, strict=True)]
