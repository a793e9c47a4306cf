"""Several adapters on one base: swapped in place, or mixed in one batch, another adapter for each row in one forward pass.

Hu et al. 2021, arXiv:2106.09685, section 4.2, name the second as what merged weights cannot do. Here rows with the same adapter are one
group, and two batched products over the stacked factors serve all groups at once (tools/LOG.md has what else was measured; batching
over gathered factors is Chen et al.'s, 2023, arXiv:2310.18547, section 4). Which rows meet which factors is laid out once a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlite.errors import AdapterError, and_more, shown
from qlite.methods.base import AdaptedLinear, put_module
from qlite.methods.lora_product import Adapted, lora_products
from qlite.methods.low_rank import LowRank
from qlite.quant.linear import compute_dtype, dense_weight, is_linear

BASE = "base"
"""The name under which a row gets no adapter."""


class AdapterBank:
    """Named adapters over the base of one model. Its base's weights are read and never written.

    Adapters may be of different ranks and targets, LoRA, rsLoRA and DoRA. A bank begins with none, and ``BASE`` chosen for all rows.
    """

    mixes: ClassVar[bool] = True
    """Whether rows of one batch may have different ones."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        """``model``: with no adapter on it; ``device``: where it computes."""
        self.model, self.device = model, device
        self.names: list[str] = []
        self._linears: dict[str, BankedLinear] = {}

    def add(self, name: str, updates: dict[str, LowRank]) -> None:
        """Take in an adapter, what it does by the linear's dotted name. Its factors are copied in the dtype that the base computes in.

        Raises:
            AdapterError: the name is taken, or the adapter does not fit the base; nothing is taken in then.
        """
        problems = [f'the name "{shown(name)}" is taken'] if name in (BASE, *self.names) else []
        if problems := problems + misfits(updates, linear_shapes(self.model)):
            raise AdapterError(f'adapter "{shown(name)}": {"; ".join(problems)}')
        for layer, update in updates.items():
            if layer not in self._linears:
                self._linears[layer] = BankedLinear(self.model.get_submodule(layer))
                put_module(self.model, layer, self._linears[layer])
            self._linears[layer].add(name, update, self.device)
        self.names.append(name)

    def remove(self, name: str) -> None:
        """Let go of an adapter; a linear that no other adapter changes is the base's own again. All rows get ``BASE``.

        Raises:
            AdapterError: there is none of this name.
        """
        self._require(name)
        self.use(BASE)
        self.names.remove(name)
        for layer, linear in list(self._linears.items()):
            linear.updates.pop(name, None)
            if not linear.updates:
                put_module(self.model, layer, linear.base)
                del self._linears[layer]

    def use(self, names: str | Sequence[str]) -> None:
        """Choose the adapter ``names`` for all rows, of however many, or one for each row of the next batches; ``BASE`` is none.

        Raises:
            AdapterError: there is none of this name.
        """
        rows = [names] if isinstance(names, str) else list(names)
        for name in dict.fromkeys(rows):
            self._require(name)
        if len(set(rows)) == 1:
            for linear in self._linears.values():
                linear.chosen = linear.updates.get(rows[0])
            return
        routes: dict[tuple[str, ...], Route] = {}
        for linear in self._linears.values():
            here = tuple(name for name in dict.fromkeys(rows) if name in linear.updates)
            if here not in routes:
                routes[here] = Route.of(rows, here, self.device)
            linear.chosen = linear.mixture(routes[here]) if here else None

    def require_base(self) -> None:
        """Do nothing: the base's weights are never written."""

    def _require(self, name: str) -> None:
        if name not in (BASE, *self.names):
            known = ", ".join(f'"{each}"' for each in (BASE, *self.names))
            raise AdapterError(f'no adapter is called "{shown(name)}"; there are {known}')


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return [out, in] of each linear of ``model``, in a bank or not, by its dotted name."""
    banked = {name: module.base for name, module in model.named_modules() if isinstance(module, BankedLinear)}
    inside = {f"{name}.base" for name in banked}
    plain = {name: module for name, module in model.named_modules() if is_linear(module) and name not in inside}
    return {name: (linear.out_features, linear.in_features) for name, linear in {**banked, **plain}.items()}


def misfits(updates: dict[str, LowRank], shapes: dict[str, tuple[int, int]]) -> list[str]:
    """Return what of an adapter does not fit linears of ``shapes`` [out, in] by dotted name; the first of each kind stands for all."""
    unknown = [layer for layer in updates if layer not in shapes]
    other = [layer for layer in updates if layer in shapes and shapes[layer] != updates[layer].shape]
    problems = []
    if unknown:
        problems.append(f"the base has no linear layer {shown(unknown[0])}{and_more(len(unknown) - 1)}")
    if other:
        own, base = list(updates[other[0]].shape), list(shapes[other[0]])
        problems.append(f"it is for a {shown(other[0])} of {own}, and the base's is {base}{and_more(len(other) - 1)}")
    return problems


@dataclass(frozen=True)
class Route:
    """Which rows of a batch meet which adapters: rows of one adapter are a group, and all groups are as long as the longest.

    ``names``: the groups' adapters; ``taken`` [K * longest]: the row at each place, 0 where a group has none left; ``rows`` and
    ``places`` [N]: the rows that have an adapter, and where each one's result is; both None where every row stands at its place already.
    """

    names: tuple[str, ...]
    count: int
    taken: Tensor
    rows: Tensor | None
    places: Tensor | None

    @classmethod
    def of(cls, chosen: Sequence[str], names: tuple[str, ...], device: torch.device) -> "Route":
        """Return the way of the rows that have chosen one of ``names``."""
        groups = [[row for row, name in enumerate(chosen) if name == each] for each in names]
        longest = max(map(len, groups), default=0)
        taken = [row for group in groups for row in [*group, *[0] * (longest - len(group))]]
        placed = [(row, k * longest + i) for k, group in enumerate(groups) for i, row in enumerate(group)]
        rows, places = ([pair[side] for pair in placed] for side in (0, 1))
        if taken == list(range(len(chosen))):
            return cls(names, len(chosen), torch.tensor(taken, device=device), None, None)
        return cls(names, len(chosen), *(torch.tensor(each, device=device) for each in (taken, rows, places)))

    def grouped(self, x: Tensor) -> Tensor:
        """Return the rows of x [rows, T, width] as [K, longest * T, width]: a window on x where every row stands at its place already."""
        placed = x if self.rows is None else x.index_select(0, self.taken)
        return placed.reshape(len(self.names), -1, x.shape[-1])

    def put_back(self, grouped: Tensor, y: Tensor) -> None:
        """Copy ``grouped`` [K, longest * T, out] to the rows of y [rows, T, out] that it is of."""
        if self.rows is not None:
            y.index_copy_(0, self.rows, grouped.view(-1, *y.shape[1:]).index_select(0, self.places))


@dataclass(frozen=True)
class Tuned:
    """One adapter's part of one linear: the update, and for DoRA how much longer it makes each row, [out] float32."""

    update: LowRank
    gain: Tensor | None = None


@dataclass(frozen=True)
class Mixture:
    """The factors of K adapters as one, zeros where an adapter's rank is smaller than the largest R; and the rows that meet them."""

    route: Route
    A: Tensor
    """[K, R, in]"""
    B: Tensor
    """[K, out, R]"""
    scaling: float | Tensor
    """Of all; where they differ [K, 1, 1], float32 at least: in bfloat16 a scaling would be up to 0.4 % off."""
    gain: Tensor | None
    """[K, 1, out] float32, 1 where a row keeps its length; None where all do."""


class BankedLinear(AdaptedLinear):
    """A frozen linear and the updates of any number of adapters, one of which, or one for each row, is added."""

    def __init__(self, base: nn.Module):
        super().__init__(base)
        self.updates: dict[str, Tuned] = {}
        self.chosen: Tuned | Mixture | None = None
        self._mixture: Mixture | None = None

    def add(self, name: str, update: LowRank, device: torch.device) -> None:
        """Take in one adapter's update."""
        update = update.to(compute_dtype(self.base), device)
        self.updates[name] = Tuned(update, None if update.lengths is None else self._gain(update))

    def mixture(self, route: Route) -> Mixture:
        """Return the factors that ``route`` needs, stacked; they are kept until another set of adapters is asked for."""
        if self._mixture is None or self._mixture.route.names != route.names:
            self._mixture = None  # before the next one is made
            self._mixture = _stacked(route, [self.updates[name] for name in route.names])
        elif self._mixture.route is not route:
            old = self._mixture
            self._mixture = Mixture(route, old.A, old.B, old.scaling, old.gain)
        return self._mixture

    def forward(self, x: Tensor) -> Tensor:
        """Map x [rows, ..., in] to [rows, ..., out], in x's dtype."""
        if isinstance(self.chosen, Mixture):
            return self._mixed(x, self.chosen)
        return self.base(x) if self.chosen is None else self._tuned(x, self.chosen)

    def _tuned(self, x: Tensor, tuned: Tuned) -> Tensor:
        update = tuned.update
        if tuned.gain is None:
            return lora_products(x, [Adapted(self.base, update.A, update.B, update.scaling)])[0]
        y = self.base(x)
        delta = (x @ update.A.T) @ update.B.T * update.scaling
        return y + self._lengthened(y, delta, tuned.gain)

    def _mixed(self, x: Tensor, mixture: Mixture) -> Tensor:
        route = mixture.route
        # Some families flatten [rows, T, in] before a linear: the rows are still one after the other.
        if x.dim() < 2 or (x.shape[0] != route.count and not (x.dim() == 2 and len(x) % route.count == 0)):
            raise AdapterError(f"adapters were chosen for the {route.count} rows of a batch, and one of {len(x)} came; choose them anew")
        y = self.base(x)
        rows, y_rows = x.reshape(route.count, -1, x.shape[-1]), y.view(route.count, -1, y.shape[-1])
        low, sums = torch.bmm(route.grouped(rows), mixture.A.transpose(1, 2)), route.grouped(y_rows)
        alpha, B = 1.0, mixture.B.transpose(1, 2)
        if isinstance(mixture.scaling, float):
            alpha = mixture.scaling
        else:
            low.mul_(mixture.scaling)
        if mixture.gain is None:
            sums.baddbmm_(low, B, alpha=alpha)
        else:
            sums.add_(self._lengthened(sums, torch.bmm(low, B).mul_(alpha), mixture.gain))
        route.put_back(sums, y_rows)
        return y

    def _lengthened(self, y: Tensor, delta: Tensor, gain: Tensor) -> Tensor:
        """Return what is to be added to y, the base's, for DoRA: its own rows are as much longer as those of the update."""
        plain = y if self.base.bias is None else y - self.base.bias
        return plain * (gain - 1).to(y.dtype) + delta * gain.to(y.dtype)

    def _gain(self, update: LowRank) -> Tensor:
        """Return m / ||W + sBA|| of each row, which nothing changes any more."""
        adapted = dense_weight(self.base).to(update.A.device) + update.dense()
        return update.lengths / adapted.norm(dim=1)


def _stacked(route: Route, parts: list[Tuned]) -> Mixture:
    first, rank = parts[0].update, max(part.update.rank for part in parts)
    (rows, columns), count = first.shape, len(parts)
    A, B = first.A.new_zeros(count, rank, columns), first.B.new_zeros(count, rows, rank)
    for k, part in enumerate(parts):
        A[k, : part.update.rank], B[k, :, : part.update.rank] = part.update.A, part.update.B
    gain = None
    if any(part.gain is not None for part in parts):
        one = torch.ones(rows, device=A.device)
        gain = torch.stack([one if part.gain is None else part.gain for part in parts]).unsqueeze(1)
    scalings = [part.update.scaling for part in parts]
    dtype = torch.promote_types(A.dtype, torch.float32)
    scaling = scalings[0] if len(set(scalings)) == 1 else torch.tensor(scalings, dtype=dtype, device=A.device).view(-1, 1, 1)
    return Mixture(route, A, B, scaling, gain)
