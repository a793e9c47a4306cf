"""LoRA's linears of several models in one pass: rows lie in groups, one a model, and the frozen product is made once for all of them.

Hu et al. 2021, arXiv:2106.09685, section 4.1: y = W x + s B A x, where W is one for all groups and A, B, s are each group's own. So a
packed weight is made dense once for as many adapters as are trained, and a gradient reaches no adapter but through its own rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlite.errors import RecipeError
from qlite.methods.base import AdaptedLinear, Method, adapted_linears, put_module, stand_ins
from qlite.methods.lora import LoRALinear
from qlite.methods.views import view_of
from qlite.model.elementwise import Origin, origin_of
from qlite.quant.linear import grad_of_input, kept_dense, product


@dataclass
class Groups:
    """How many rows of a batch belong to each model, in order; set before a pass and as it is until its gradient is there."""

    rows: tuple[int, ...] = ()
    members: tuple[int, ...] = field(default=())
    """Which model each group is of."""

    def sizes(self, count: int) -> list[int]:
        """Return the tokens of each group, of ``count`` in all: lines are equally long."""
        *first, last = [rows * count // sum(self.rows) for rows in self.rows]
        return [*first, last + count - sum(first) - last]  # where a plan evaluates fewer rows, whose they are does not matter


def join(model: nn.Module, views: Sequence[nn.Module]) -> Groups:
    """Let ``model`` compute what ``views`` of it do, each on its own group of rows; return what says which rows these are.

    Raises:
        RecipeError: something is adapted that is no linear.
    """
    groups, found = Groups(), [dict(adapted_linears(view)) for view in views]
    for view in views:
        if others := [name for name, module in stand_ins(view) if not isinstance(module, LoRALinear)]:
            raise RecipeError(f"{others[0]} is trained otherwise than by LoRA, and only that is trained together; train it alone")
    for name in dict.fromkeys(name for adapted in found for name in adapted):
        put_module(model, name, GroupedLinear(model.get_submodule(name), [adapted.get(name) for adapted in found], groups))
    return groups


@dataclass(frozen=True, kw_only=True)
class Several(Method):
    """The adapters of several runs over one base: what a memory plan attaches in the place of one method."""

    name: ClassVar[str] = "several"
    parts: tuple[Method, ...]
    rows: tuple[int, ...]
    """Of each run's micro-batch."""

    @property
    def words(self) -> str:
        return " | ".join(part.words for part in self.parts)

    def attach(self, model: nn.Module) -> None:
        views = [view_of(model) for _ in self.parts]
        for part, view in zip(self.parts, views, strict=True):
            part.attach(view)
        groups = join(model, views)
        groups.rows, groups.members = self.rows, tuple(range(len(self.rows)))

    def options_of(self, name: str, tensor: nn.Parameter) -> dict[str, object]:
        return {"run": int(name.partition(".parts.")[2].partition(".")[0])}  # an optimizer each


class GroupedLinear(AdaptedLinear):
    """A frozen linear, and what each of several models has made of it: None where one has left it as it is."""

    def __init__(self, base: nn.Module, parts: Sequence[LoRALinear | None], groups: Groups):
        super().__init__(base)
        self.parts, self.groups = nn.ModuleList(part or nn.Identity() for part in parts), groups
        self.knows_origins = all(type(part) is LoRALinear for part in parts if part)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [rows, ..., in], or [all tokens, in], to [..., out], in x's dtype."""
        parts = [self.parts[member] for member in self.groups.members]
        rows = x.reshape(-1, x.shape[-1])
        sizes = self.groups.sizes(len(rows))
        if all(type(part) in (LoRALinear, nn.Identity) for part in parts):
            shares = [part.dropped_share if isinstance(part, LoRALinear) else 0.0 for part in parts]
            given = [part.adapted() if isinstance(part, LoRALinear) else None for part in parts]
            factors = [factor for each in given for factor in ((each.A, each.B) if each else (None, None))]
            scalings = [each.scaling if each else 0.0 for each in given]
            dense = kept_dense(self.base, x.dtype) if torch.is_grad_enabled() else None
            y = _Grouped.apply(rows, self.base, sizes, scalings, shares, (dense, origin_of(x)), *factors)
        else:  # DoRA: its own code, on its own rows
            halves = zip(parts, rows.split(sizes), strict=True)
            y = torch.cat([self.base(own) if isinstance(part, nn.Identity) else part(own) for part, own in halves])
        return y.view(*x.shape[:-1], y.shape[-1])


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        rows: Tensor,
        base: nn.Module,
        sizes: list[int],
        scalings: list[float],
        shares: list[float],
        known: tuple[Tensor | None, Origin | None],
        *factors: Tensor | None,
    ) -> Tensor:
        """``known``: the dense weight, where it is kept, and what ``rows`` were made of, where that is to be kept in their place."""
        dense, origin = known
        y, lows, masks = product(base, rows, dense), [], []
        for x, out, A, B, scaling, share in zip(
            rows.split(sizes), y.split(sizes), factors[::2], factors[1::2], scalings, shares, strict=True
        ):
            dropped, mask = torch.native_dropout(x, share, True) if share else (x, None)
            low = None if A is None else dropped @ A.T
            if low is not None:
                out.addmm_(low, B.T, alpha=scaling)
            lows.append(low)
            masks.append(mask)
        ctx.base, ctx.sizes, ctx.scalings, ctx.shares = base, sizes, scalings, shares
        inputs = origin.inputs if origin else (rows,)
        ctx.op, ctx.made_of = origin.op if origin else None, len(inputs)
        ctx.save_for_backward(dense, *factors, *lows, *masks, *inputs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        count = len(ctx.sizes)
        dense, *others = ctx.saved_tensors
        others, inputs = others[: -ctx.made_of], others[-ctx.made_of :]
        rows = ctx.op(*inputs).reshape(len(grad), -1) if ctx.op else inputs[0]
        factors, lows, masks = others[: 2 * count], others[2 * count : 3 * count], others[3 * count :]
        grad_x = grad_of_input(ctx.base, grad, None, dense) if ctx.needs_input_grad[0] else None
        grads = []
        for number, (x, out) in enumerate(zip(rows.split(ctx.sizes), grad.split(ctx.sizes), strict=True)):
            A, B, low, mask = factors[2 * number], factors[2 * number + 1], lows[number], masks[number]
            if A is None:
                grads += [None, None]
                continue
            scaling, kept = ctx.scalings[number], 1 - ctx.shares[number]
            low_grad = torch.addmm(low, out, B, beta=0, alpha=scaling)
            dropped = x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1 / kept)
            grads += [low_grad.T @ dropped, torch.addmm(B, out.T, low, beta=0, alpha=scaling)]
            if grad_x is not None:
                own = grad_x.split(ctx.sizes)[number]
                if mask is None:
                    own.addmm_(low_grad, A)
                else:
                    own += torch.ops.aten.native_dropout_backward(low_grad @ A, mask, 1 / kept)
        return grad_x, None, None, None, None, None, *grads
