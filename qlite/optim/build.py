"""The optimizers a recipe can name: bitsandbytes' and torch's, stepping over flat float32 masters of bfloat16 weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Annotated, Literal

import bitsandbytes as bnb
import torch
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qlite.device import supports_paging
from qlite.errors import RunError
from qlite.optim.flat import FlatParameters
from qlite.optim.projected import ProjectedParameters
from qlite.optim.pruning import prune_moments
from qlite.table import Table

Flat = FlatParameters | ProjectedParameters
Share = Annotated[float, Field(ge=0, lt=1)]
# Where a device cannot page, the same optimizer with resident state takes over.
UNPAGED = {"paged_adamw": "adamw", "paged_adamw8bit": "adamw8bit"}


@dataclass(frozen=True, kw_only=True)
class Optimizer(Table):
    """The optimizer of what is trained."""

    name: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "lion8bit", "torch_adamw"] = "paged_adamw8bit"
    """AdamW or Lion. "8bit": state in 8 bit; "paged": state in memory that the driver may move to the host."""
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Highest learning rate, reached after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of all that is trained."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay rates of the first and second moment (Lion: of its two averages)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to AdamW's denominator."""

    def build(self, groups: list[dict], device: torch.device, note: Callable[[str], None] = print) -> "FlatOptimizer":
        """Return the optimizer over ``groups`` ({"params": [...], "lr": ...}), all on ``device``.

        A group with "rank", "update_every" and "scale" is of matrices, whose gradients are projected (``ProjectedParameters``); one
        with a "part" may get a learning rate factor of its own.
        """
        name = self.name
        if name in UNPAGED and not supports_paging(device):
            name = UNPAGED[name]
            note(f'optimizer.name = "{self.name}": there is no paged memory on {device.type}, so its unpaged twin "{name}" is used')
        flats = [(flat, group) for group in groups for flat in _flatten(group)]
        inner_groups = [{"params": [flat.master], "lr": group["lr"], "weight_decay": self.weight_decay} for flat, group in flats]
        with unset_fake_temporarily():  # bitsandbytes computes its code tables from their values, and a traced step has none
            inner = self._inner(name, inner_groups)
        optimizer = FlatOptimizer(inner, [flat for flat, _ in flats], [group.get("part", "") for _, group in flats])
        optimizer.make_state()  # now, so that no step needs more than the first
        return optimizer

    def _inner(self, name: str, groups: list[dict]) -> torch.optim.Optimizer:
        if name == "lion8bit":
            return bnb.optim.Lion8bit(groups, betas=self.betas)
        classes = {
            "adamw": bnb.optim.AdamW32bit,
            "adamw8bit": bnb.optim.AdamW8bit,
            "paged_adamw": bnb.optim.PagedAdamW32bit,
            "paged_adamw8bit": bnb.optim.PagedAdamW8bit,
            "torch_adamw": partial(torch.optim.AdamW, fused=True),  # fused: without temporaries of the parameters' size
        }
        return classes[name](groups, betas=self.betas, eps=self.eps)


class FlatOptimizer:
    """An optimizer whose parameters are flat float32 masters, of which one at a time exists, and only during ``step``."""

    def __init__(self, inner: torch.optim.Optimizer, flats: list[Flat], parts: list[str]):
        """``parts``: which part of a method each flat is of; "" where none has a factor of its own."""
        self.inner, self.flats, self.parts = inner, flats, parts
        self._base_lr = [group["lr"] for group in inner.param_groups]
        self._done = 0
        """Flats that a step under way has finished; it runs over none, so that a step which failed can be called again."""
        self._is_stepped = False
        """Whether the next of them has been stepped, but not closed."""

    def set_lr_factor(self, factor: float, of_parts: Mapping[str, float] = MappingProxyType({})) -> float:
        """Scale every group's learning rate to ``factor`` of its highest, and to its part's, if that has one; return the first group's."""
        for group, lr, part in zip(self.inner.param_groups, self._base_lr, self.parts, strict=True):
            group["lr"] = lr * factor * of_parts.get(part, 1.0)
        return self.inner.param_groups[0]["lr"]

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Return each parameter's summed float32 gradient, of its shape or its projection's: the sum itself, no copy.

        It is zeros but for before a step.
        """
        return {p: part for flat in self.flats for p, part in flat.gradients()}

    def restart(self, values: dict[nn.Parameter, Tensor], dropped: float) -> None:
        """Let parameters be ``values``, their masters exactly, and set the share ``dropped`` of least magnitude of each's state to zero."""
        for flat in self.flats:
            for param in flat.params:
                if param in values:
                    flat.write(param, values[param])
                    prune_moments(self.inner.state[flat.master], flat.place(param), dropped)

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their common L2 norm is at most ``max_norm`` (0: leave them); return the norm before.

        One norm per flat buffer and no synchronisation with the device: the returned scalar lies there.
        """
        grads = [flat.grad for flat in self.flats]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
        if max_norm > 0:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for grad in grads:
                grad.mul_(scale)
        return norm

    def make_state(self) -> None:
        """Allocate all state: what a step allocates itself is then given back at its end."""
        for index, flat in enumerate(self.flats):
            self._make_state(index, flat)

    def step(self) -> None:
        """Update all parameters from their gradient sums, and zero the sums.

        A step that ran out of memory goes on when it is called again: no parameter is ever updated twice.
        """
        groups = self.inner.param_groups
        for flat, group in zip(self.flats[self._done :], groups[self._done :], strict=True):
            if not self._is_stepped:
                self._step_one(flat)
            self._is_stepped = True
            flat.close(group["lr"] * group["weight_decay"])
            self._is_stepped = False
            self._done += 1
        self._done = 0

    def zero_grad(self) -> None:
        """Drop what has been summed since the last step, and what a backward pass that failed has left."""
        for flat in self.flats:
            flat.forget()

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return all state as (tensors by name, numbers by name), enough for ``load_state`` to go on with the same bits."""
        tensors, numbers = {}, {}
        for index, flat in enumerate(self.flats):
            for key, value in {**flat.saved(), **self.inner.state.get(flat.master, {})}.items():
                (tensors if isinstance(value, Tensor) else numbers)[f"{index}.{key}"] = value
        return tensors, numbers

    def load_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Restore what ``state`` returned, over the same parameters.

        Raises:
            RunError: the tensors are not those of this optimizer over these parameters.
        """
        for index, flat in enumerate(self.flats):
            mine = {k.partition(".")[2]: v for k, v in {**tensors, **numbers}.items() if k.startswith(f"{index}.")}
            own = flat.saved()
            given = {key: mine.pop(key) for key in {*own, "remainder"} if key in mine}
            if given.keys() != own.keys() or any(isinstance(v, Tensor) and v.shape != given[key].shape for key, v in own.items()):
                raise RunError(f"optimizer state of group {index} is not of these {flat.size} parameters; start afresh with --fresh")
            flat.load(given)
            if mine:
                self._load_inner(flat, mine)

    def _load_inner(self, flat: Flat, saved: dict) -> None:
        """Copy the saved state into the optimizer's own, which ``build`` has allocated: paged memory cannot be handed to it."""
        state = self.inner.state[flat.master]
        for key, value in saved.items():
            if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
                state[key].copy_(value)
            else:
                state[key] = value.to(flat.grad.device) if isinstance(value, Tensor) else value

    def _make_state(self, index: int, flat: Flat) -> None:
        """Allocate the state of ``flat``, whole or not at all."""
        try:
            flat.open()
            if hasattr(self.inner, "init_state"):
                self.inner.init_state(self.inner.param_groups[index], flat.master, index, 0)
            else:  # what torch's AdamW makes in its first step
                moments = {key: torch.zeros_like(flat.master) for key in ("exp_avg", "exp_avg_sq")}
                self.inner.state[flat.master] = {"step": torch.zeros((), device=flat.grad.device), **moments}
        except BaseException:
            self.inner.state.pop(flat.master, None)
            raise
        finally:
            flat.drop()

    def _step_one(self, flat: Flat) -> None:
        """Open ``flat`` and let the optimizer step it alone: of all masters only this one has a gradient."""
        state = self.inner.state[flat.master]
        count = state["step"].clone() if isinstance(state["step"], Tensor) else state["step"]
        try:
            flat.open()
            self.inner.step()
        except BaseException:
            # Both libraries count a step before they make it.
            state["step"] = count
            flat.drop()
            raise


def _flatten(group: dict) -> list[Flat]:
    """Return one flat buffer per dtype of ``group``, in order of first appearance."""
    by_dtype: dict[torch.dtype, list] = {}
    for p in group["params"]:
        by_dtype.setdefault(p.dtype, []).append(p)
    if "update_every" in group:
        projection = group["rank"], group["update_every"], group["scale"]
        return [ProjectedParameters(same, *projection) for same in by_dtype.values()]
    return [FlatParameters(same) for same in by_dtype.values()]
