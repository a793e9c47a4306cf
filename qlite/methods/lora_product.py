"""The products of LoRA's linears in one autograd function: y = W x + s B A x, for one linear or for several that share x.

Hu et al. 2021, arXiv:2106.09685, section 4.1. Autograd's own graph of that line makes two more tensors of y's size (B A x, and s
times it), and one of x's size for every product's gradient. Here each product is added where the sum lies already, the A of several
linears are one product, and what is kept for the backward pass is x, or what it was made of, A x and, with dropout, one byte for each
number of x and linear.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlite.model.elementwise import Origin, origin_of
from qlite.quant.linear import grad_of_input, kept_dense, product


class Adapted(NamedTuple):
    """One linear of a joint product."""

    base: nn.Module
    """Frozen, in any storage."""
    A: Tensor
    """[R, in]"""
    B: Tensor
    """[out, R]"""
    scaling: float


class _Mask(NamedTuple):
    """What dropout let through."""

    places: Tensor
    """[N, in] bool"""
    factor: float

    def applied(self, rows: Tensor) -> Tensor:
        """Return ``rows`` [N, in], x or a gradient of it, as dropout leaves them."""
        return torch.ops.aten.native_dropout_backward(rows, self.places, self.factor)


def lora_products(x: Tensor, linears: Sequence[Adapted], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """Return y [..., out] of each of ``linears`` for x [..., in], in x's dtype. ``dropout``: the share of each A's input that is dropped.

    Every linear draws a mask of its own, anew in every call. Where a block is computed again for its gradient, torch's checkpointing
    sets the generators back first, so the masks are the same.
    """
    factors = [factor for linear in linears for factor in (linear.A, linear.B)]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors))):
        return _sums(x, _low(x, linears, dropout)[0], linears, [None] * len(linears))
    # Kept before the products by W: where a block is computed again, torch stops as soon as it has all that was kept the first time,
    # so the last linear's W is not multiplied again.
    dense = [kept_dense(linear.base, x.dtype) for linear in linears]
    low, handle = _Kept.apply(x, linears, dropout, dense, origin_of(x), *factors)
    return _Products.apply(x, low.detach(), [handle], linears, dense, *factors)


class _Kept(torch.autograd.Function):
    """A x of all linears, and an empty tensor whose node keeps what the gradient needs; no gradient flows through it.

    Before torch 2.13 a node keeps it only while one of its outputs lives, and A x is to live no longer than the forward pass.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        linears: Sequence[Adapted],
        dropout: float,
        dense: list[Tensor | None],
        origin: Origin | None,
        *_factors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        low, masks = _low(x, linears, dropout)
        inputs = origin.inputs if origin else (x,)
        ctx.save_for_backward(low, *dense, *masks, *inputs)
        ctx.kept_share, ctx.op, ctx.made_of = 1 - dropout, origin.op if origin else None, len(inputs)
        return low, x.new_empty(0)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, low: Tensor, handle: list[Tensor], linears: Sequence[Adapted], dense: list[Tensor | None], *_factors: Tensor
    ) -> tuple[Tensor, ...]:
        # In a list, out of autograd's sight: no gradient is to flow to it.
        ctx.handle, ctx.linears = handle, linears
        return _sums(x, low, linears, dense)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        handle = ctx.handle.pop()
        kept = handle.grad_fn
        low, *others = kept.saved_tensors
        others, inputs = others[: -kept.made_of], others[-kept.made_of :]
        dense, masks = others[: len(ctx.linears)], others[len(ctx.linears) :]
        masks = [_Mask(mask, 1 / kept.kept_share) for mask in masks]
        x = kept.op(*inputs) if kept.op else inputs[0]
        del handle, kept, inputs
        shape, rows, linears = x.shape, x.reshape(-1, x.shape[-1]), ctx.linears
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        ranks = [len(linear.A) for linear in linears]
        grad_low, grads_B = torch.empty_like(low), []
        for linear, grad, low_of_it, into in zip(linears, grads, low.split(ranks, 1), grad_low.split(ranks, 1), strict=True):
            # The scale is part of the product; with beta = 0 the first argument gives its shape alone.
            torch.addmm(low_of_it, grad, linear.B, beta=0, alpha=linear.scaling, out=into)
            grads_B.append(torch.addmm(linear.B, grad.T, low_of_it, beta=0, alpha=linear.scaling))
        grads_A = _grads_of_A(rows, grad_low, masks, ranks)
        # x is needed no more, and the largest tensor yet to come is as large.
        del x, rows, low, low_of_it
        grad_x = _grad_of_x(grads, grad_low, masks, linears, dense).view(shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None, *(each for pair in zip(grads_A, grads_B, strict=True) for each in pair)


def _low(x: Tensor, linears: Sequence[Adapted], dropout: float) -> tuple[Tensor, list[Tensor]]:
    """Return A x of all linears side by side, [N, all R], and the mask [N, in] (bool) of each if there is dropout."""
    rows = x.reshape(-1, x.shape[-1])
    if not dropout:
        return rows @ _all_A(linears).T, []
    low, masks = [], []
    for linear in linears:
        dropped, mask = torch.native_dropout(rows, dropout, True)
        low.append(dropped @ linear.A.T)
        masks.append(mask)
    return low[0] if len(low) == 1 else torch.cat(low, 1), masks


def _sums(x: Tensor, low: Tensor, linears: Sequence[Adapted], dense: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Return y of each linear, given A x of all, and the weights that are dense already."""
    outputs = []
    for linear, weight, low_of_it in zip(linears, dense, low.split([len(linear.A) for linear in linears], dim=1), strict=True):
        y = product(linear.base, x, weight)
        y.view(-1, y.shape[-1]).addmm_(low_of_it, linear.B.T, alpha=linear.scaling)
        outputs.append(y)
    return tuple(outputs)


def _grads_of_A(rows: Tensor, grad_low: Tensor, masks: list[_Mask], ranks: list[int]) -> Sequence[Tensor]:
    """Return the gradient [R, in] of each A, given that of A x of all, [N, all R]."""
    if not masks:
        return (grad_low.T @ rows).split(ranks)
    return [grad.T @ mask.applied(rows) for grad, mask in zip(grad_low.split(ranks, 1), masks, strict=True)]


def _grad_of_x(grads: list[Tensor], grad_low: Tensor, masks: list[_Mask], linears: Sequence[Adapted], dense: list[Tensor | None]) -> Tensor:
    """Return the gradient [N, in] of x, summed over all linears."""
    total = None
    for linear, grad, weight in zip(linears, grads, dense, strict=True):
        total = grad_of_input(linear.base, grad, total, weight)
    if not masks:
        return total.addmm_(grad_low, _all_A(linears))
    for linear, grad, mask in zip(linears, grad_low.split([len(linear.A) for linear in linears], 1), masks, strict=True):
        total += mask.applied(grad @ linear.A)
    return total


def _all_A(linears: Sequence[Adapted]) -> Tensor:
    return linears[0].A if len(linears) == 1 else torch.cat([linear.A for linear in linears])
