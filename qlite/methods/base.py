"""What every method of adapting a frozen model has in common.

A ``Method`` is a frozen dataclass: its fields are the keys of the recipe's [method] table. It keeps no state. All that
it learns are tensors inside the model, so saving, resuming, planning and counting need no method's help.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlite.errors import NotMergeable, RecipeError, shown
from qlite.quant.linear import is_linear
from qlite.table import Table

Targets = str | tuple[str, ...]


class StandIn:
    """What a method has put in the place of a frozen module, which it keeps as ``base``: put back, that makes the model its own again."""

    base: nn.Module


class AdaptedLinear(StandIn, nn.Module):
    """A frozen linear and the trainable tensors that one method adds to it.

    ``base`` may be stored in 4, 8 or 16 bit; a subclass only ever calls it.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def merged_weight(self, dense: Tensor) -> Tensor:
        """Return the one weight equal to this module, [out, in] float32, given the base's ``dense`` weight (float32).

        Raises:
            NotMergeable: the module is not a linear map.
        """
        raise NotMergeable(f"{type(self).__name__} is not one linear map; export it with --adapter instead of --merge")


@dataclass(frozen=True, kw_only=True)
class Method(Table):
    """One way to adapt a frozen model. A subclass must write ``attach``; the other hooks have defaults."""

    name: ClassVar[str]

    def resolved(self, tokenizer: PreTrainedTokenizerBase | None) -> "Method":
        """Return the method with the ids of the tokens that it names; tokens that it makes are added to ``tokenizer``.

        Without a tokenizer the ids are any: for a plan, which only their number matters to.
        """
        return self

    def attach(self, model: nn.Module) -> None:
        """Put the trainable tensors into ``model``, whose own parameters are frozen already."""
        raise NotImplementedError

    def param_groups(self, model: nn.Module, lr: float) -> list[dict]:
        """Return the optimizer's groups. Default: every trainable tensor at ``lr``."""
        return [{"params": list(trainable_tensors(model).values()), "lr": lr}]

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return a term to add to the loss of a step, or None."""
        return None

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Run after optimizer step number ``step``, counted from 1."""


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what a method has put into ``model`` to be trained, by dotted name, in model order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trainable_count(model: nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(p.numel() for p in trainable_tensors(model).values())


def stand_ins(model: nn.Module) -> Iterator[tuple[str, StandIn]]:
    """Yield (dotted name, module) for all that stands in the place of a frozen module, in model order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, StandIn))


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Yield (dotted name, module) for every adapted linear, in model order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let ``model`` answer as its base does, bit for bit, until the context is left: what is adapted has its base in its place.

    Nothing is copied or loaded. Inside another ``adapters_off`` nothing is left to switch, and the outer one switches back.
    """
    found = list(stand_ins(model))
    inner = {each for _, module in found for each in module.modules() if each is not module}
    places = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module) for name, module in found if module not in inner
    ]
    try:
        for owner, leaf, module in places:
            setattr(owner, leaf, _frozen(module))
        yield
    finally:
        for owner, leaf, module in places:
            # model.train() and model.eval() did not reach what was taken out; the base heard them.
            setattr(owner, leaf, module.train(_frozen(module).training))


def _frozen(module: nn.Module) -> nn.Module:
    """Return the base of a stand-in, or of what that stands on."""
    return _frozen(module.base) if isinstance(module, StandIn) else module


def adapt_linears(model: nn.Module, targets: Targets, wrap: Callable[[str, nn.Module], AdaptedLinear]) -> None:
    """Replace every linear that ``targets`` names by ``wrap(name, linear)``.

    Raises:
        RecipeError: a target names no linear of this model.
    """
    for name in select_linears(model, targets):
        put_module(model, name, wrap(name, model.get_submodule(name)))


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` into ``model`` in the place of what has the dotted ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def select_linears(model: nn.Module, targets: Targets) -> list[str]:
    """Return the dotted names of the linears that ``targets`` names, in model order.

    "all-linear": every linear inside the decoder blocks (not the output head); "attention": those of the attention
    modules; otherwise leaf names ("q_proj") or patterns with * and ? for leaf or whole names ("model.layers.1?.*").

    Raises:
        RecipeError: a target names no linear of this model.
    """
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    head = model.get_output_embeddings()
    inside = [name for name in linears if model.get_submodule(name) is not head]
    if targets == "all-linear":
        return inside
    if targets == "attention":
        return [name for name in inside if _in_attention(model, name)]
    wanted = (targets,) if isinstance(targets, str) else targets
    problems = [problem for target in wanted if (problem := _unmatched(target, linears))]
    if problems:
        raise RecipeError(problems)
    return [name for name in linears if any(matches(name, target) for target in wanted)]


def matches(name: str, pattern: str) -> bool:
    """Return whether a layer's dotted ``name``, or its last part, is ``pattern`` (with * and ? and [..])."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def _in_attention(model: nn.Module, name: str) -> bool:
    parent = name.rpartition(".")[0]
    return "attention" in type(model.get_submodule(parent)).__name__.lower()


def _unmatched(target: str, linears: list[str]) -> str | None:
    """Return what is wrong with a target that names no linear, or None."""
    if any(matches(name, target) for name in linears):
        return None
    leaves = sorted({name.rpartition(".")[2] for name in linears})
    close = get_close_matches(target, [*leaves, "all-linear", "attention"], n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"this model has: {', '.join(leaves)}"
    return f'method.targets: no linear layer is called "{shown(target)}"; {hint}'
