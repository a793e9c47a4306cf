"""What every method of adapting a frozen model has in common.

A ``Method`` is a frozen dataclass: its fields are the keys of the recipe's [method] table. It keeps no state. All that
it learns are tensors inside the model, so saving, resuming, planning and counting need no method's help. These are the trained
parameters and, where a module says so, buffers: ``saved_buffers`` belong to the adapter, ``resumed_buffers`` to checkpoints alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlite.errors import ModelError, NotMergeable, RecipeError, shown
from qlite.quant.linear import Packed, compute_dtype, is_linear
from qlite.table import Table

Targets = str | tuple[str, ...]
PEFT_PREFIX = "base_model.model."
"""Before a tensor's name in the model, in PEFT's files of what it puts into a model's layers."""
Original = Callable[[str], Tensor]
"""Gives a frozen linear's weight [out, in] in float32 as the base's own files have it, by the linear's dotted name in the plain model."""


class Stepping(Protocol):
    """What a method sees of the optimizer around an update."""

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Return each trained parameter's summed float32 gradient, of its shape: the sum itself, no copy."""

    def restart(self, values: dict[nn.Parameter, Tensor], dropped: float) -> None:
        """Let parameters be ``values``, exactly, and set that share of the optimizer's state of each to zero: what is smallest of it."""


class StandIn:
    """What a method has put in the place of a frozen module, which it keeps as ``base``: put back, that makes the model its own again."""

    base: nn.Module

    def off(self) -> nn.Module:
        """Return what answers in this module's place as if nothing had been trained: the model's own, bit for bit, unless it says so."""
        return self.base.off() if isinstance(self.base, StandIn) else self.base


class Beside(nn.Module):
    """What a method has put beside the model's own modules; while ``is_off`` it does nothing."""

    is_off = False
    positions = 0
    """How many positions before the tokens it takes."""


class AdaptedLinear(StandIn, nn.Module):
    """A frozen linear and the trainable tensors that one method adds to it.

    ``base`` may be stored in 4, 8 or 16 bit, and may be adapted by another method already; a subclass only ever calls it.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features

    def require_mergeable(self) -> None:
        """Raise NotMergeable where this module, or one that it stands on, is no linear map."""
        if type(self).merged_weight is AdaptedLinear.merged_weight:
            self.merged_weight(torch.empty(0))
        if isinstance(self.base, AdaptedLinear):
            self.base.require_mergeable()

    @property
    def frozen(self) -> nn.Module:
        """The linear of the model's own, whatever stands between."""
        return self.base.frozen if isinstance(self.base, AdaptedLinear) else self.base

    def merged(self, dense: Tensor) -> Tensor:
        """Return the one weight equal to this module and all it stands on, [out, in] float32, given the ``frozen`` linear's weight.

        Raises:
            NotMergeable: the module is not a linear map.
        """
        return self.merged_weight(self.base.merged(dense) if isinstance(self.base, AdaptedLinear) else dense)

    def unquantised(self, original: Tensor) -> Tensor:
        """Return what the ``frozen`` linear's weight would be with all its digits, given its ``original`` in the base's own files.

        That itself, unless a method trains over another weight than the files': [out, in] float32, both.
        """
        return self.base.unquantised(original) if isinstance(self.base, AdaptedLinear) else original

    def untrained(self, dense: Tensor) -> Tensor:
        """Return the one weight equal to this module before it was trained, given the ``frozen`` linear's: [out, in] float32, both."""
        return self.base.untrained(dense) if isinstance(self.base, AdaptedLinear) else dense

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the one bias [out] equal to this module's, given the ``frozen`` linear's, if it has one. Default: that one."""
        return self.base.merged_bias(bias) if isinstance(self.base, AdaptedLinear) else bias

    def merged_weight(self, dense: Tensor) -> Tensor:
        """Return the one weight equal to this module, [out, in] float32, given the base's ``dense`` weight (float32).

        Raises:
            NotMergeable: the module is not a linear map.
        """
        raise NotMergeable(f"{type(self).__name__} is not one linear map")


@dataclass(frozen=True, kw_only=True)
class Method(Table):
    """One way to adapt a frozen model. A subclass must write ``attach``; the other hooks have defaults."""

    name: ClassVar[str]
    needs_plain_linears: ClassVar[bool] = False
    """Whether it computes with a linear's own weight, and so has to stand nearest to it where it is combined with others."""
    trains_base: ClassVar[bool] = False
    """Whether it trains the model's own weights: these have to be dense and on the device, and afterwards there is no base any more."""

    @property
    def each(self) -> "tuple[Method, ...]":
        """The methods that it is made of: itself, where it is no combination."""
        return (self,)

    is_mergeable: ClassVar[bool] = True
    """Whether weights of the base's own shapes can say what it does."""

    @property
    def words(self) -> str:
        """What it is called where people read."""
        return self.name

    @property
    def positions(self) -> int:
        """How many positions before the tokens it takes: ``longest_input`` is as much less."""
        return 0

    def having(self, key: str, value: object) -> "Method":
        """Return the same method with another value of ``key``."""
        return replace(self, **{key: value})

    def get(self, key: str) -> object:
        """Return the value of ``key``."""
        return getattr(self, key)

    def resolved(self, tokenizer: PreTrainedTokenizerBase | None) -> "Method":
        """Return the method with the ids of the tokens that it names; tokens that it makes are added to ``tokenizer``.

        Without a tokenizer the ids are any: for a plan, which only their number matters to.
        """
        return self

    def check(self, steps: int) -> None:
        """Raise RecipeError if it cannot be trained in a run of ``steps`` steps."""

    def attach(self, model: nn.Module) -> None:
        """Put the trainable tensors into ``model``, whose own parameters are frozen already."""
        raise NotImplementedError

    def start(self, model: nn.Module, original: Original) -> None:
        """Give what is attached its first values, where these depend on the base's own weights. Once, in a run that begins."""

    def settle(self, model: nn.Module, original: Original) -> None:
        """Bring the base into the state that the tensors in ``model`` were trained over; after each loading of them, before any pass."""

    def options_of(self, name: str, tensor: nn.Parameter) -> dict[str, object]:
        """Return what the optimizer is to do otherwise for the trained ``tensor``: {"lr_ratio": 16.0}. Default: nothing."""
        return {}

    def param_groups(self, model: nn.Module, lr: float) -> list[dict]:
        """Return the optimizer's groups: the trained tensors with the same options together, each at ``lr`` times its "lr_ratio"."""
        return grouped(trainable_tensors(model), lr, self.options_of)

    def lr_factor(self, step: int, steps: int) -> float:
        """Return what the learning rate of ``step``, counted from 1, is multiplied by beside its schedule's factor."""
        return 1.0

    def part_factors(self, step: int, steps: int) -> dict[str, float]:
        """Return what, beside, the learning rate of the optimizer's groups with that "part" is multiplied by. Default: nothing."""
        return {}

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return a term to add to the loss of a step, or None."""
        return None

    def before_step(self, model: nn.Module, optimizer: Stepping, step: int, steps: int) -> None:
        """Run before optimizer step number ``step`` of ``steps``, counted from 1; its gradients are summed and clipped."""

    def after_step(self, model: nn.Module, optimizer: Stepping, step: int, steps: int) -> None:
        """Run after optimizer step number ``step`` of ``steps``, counted from 1; also where it was skipped, its loss being no number."""

    def findings(self, model: nn.Module) -> list[str]:
        """Return what a user should know of what was learned, a line each. Default: nothing."""
        return []

    def peft(self, model: nn.Module) -> tuple[dict, dict[str, Tensor]] | None:
        """Return what is attached in PEFT's format: the fields of its adapter_config.json and its tensors by their whole names.

        None where PEFT has no such type.
        """
        return None


def grouped(tensors: dict[str, nn.Parameter], lr: float, options_of: Callable[[str, nn.Parameter], dict[str, object]]) -> list[dict]:
    """Return ``tensors`` as an optimizer's groups, those with the same options together, each at ``lr`` times its "lr_ratio"."""
    groups: dict[tuple, dict] = {}
    for name, tensor in tensors.items():
        options = options_of(name, tensor)
        group = groups.setdefault(tuple(sorted(options.items())), {"params": [], "lr": lr * options.pop("lr_ratio", 1.0), **options})
        group["params"].append(tensor)
    return list(groups.values())


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what a method has put into ``model`` to be trained, by dotted name, in model order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def saved_tensors(model: nn.Module, resumable: bool = False) -> dict[str, Tensor]:
    """Return all that a method has learned in ``model``, by dotted name: an adapter or, if ``resumable``, what a checkpoint has of one."""
    kinds = ("saved_buffers", "resumed_buffers") if resumable else ("saved_buffers",)
    buffers = {
        f"{prefix}.{name}" if prefix else name: module.get_buffer(name)
        for prefix, module in model.named_modules()
        for kind in kinds
        for name in getattr(type(module), kind, ())
    }
    return {**trainable_tensors(model), **buffers}


def trainable_count(model: nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(p.numel() for p in trainable_tensors(model).values())


def longest_input(model: nn.Module, taken: int | None = None) -> int | None:
    """Return the longest context in tokens that ``model`` was made for, or None where its config does not say.

    ``taken``: positions before the tokens that a method takes; by default those that it has taken in ``model``.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if taken is None:
        taken = sum(module.positions for module in model.modules() if isinstance(module, Beside))
    return limit and max(1, limit - taken)


def stand_ins(model: nn.Module) -> Iterator[tuple[str, StandIn]]:
    """Yield (dotted name, module) for all that stands in the place of a frozen module, in model order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, StandIn))


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Yield (dotted name, module) for every adapted linear, in model order; where one stands on another, the outer one."""
    return ((name, module) for name, module in outer_modules(model) if isinstance(module, AdaptedLinear))


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (dotted name, module) for every module, in model order, but for what is inside a stand-in."""
    inner: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inner:
            if isinstance(module, StandIn):
                inner |= set(module.modules())
            yield name, module


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let ``model`` answer as its base does until the context is left: what is adapted has its base in its place (``StandIn.off``).

    Nothing is copied or loaded. Inside another ``adapters_off`` nothing is left to switch, and the outer one switches back.

    Raises:
        ModelError: the model's own weights were trained, and what they were before is gone.
    """
    if is_itself_trained(model):
        raise ModelError("the run has trained the model's own weights, so the base is not in it any more; qlite.evaluate measures both")
    beside = [module for module in model.modules() if isinstance(module, Beside) and not module.is_off]
    found = list(stand_ins(model))
    inner = {each for _, module in found for each in module.modules() if each is not module}
    outer = [(*name.rpartition("."), module) for name, module in found if module not in inner]
    places = [(model.get_submodule(parent), leaf, module, module.off()) for parent, _, leaf, module in outer]
    try:
        for owner, leaf, _, off in places:
            setattr(owner, leaf, off)
        for module in beside:
            module.is_off = True
        yield
    finally:
        for module in beside:
            module.is_off = False
        for owner, leaf, module, off in places:
            # model.train() and model.eval() did not reach what was taken out; what stood there heard them.
            setattr(owner, leaf, module.train(off.training))


def train_itself(model: nn.Module, named: str) -> None:
    """Let every weight of ``model`` be trained; ``named``: the method, for messages.

    Raises:
        RecipeError: some are packed, and whole-number codes have no gradient.
    """
    packed = next((name for name, module in model.named_modules() if isinstance(module, Packed)), None)
    if packed is not None:
        raise RecipeError(
            f'method.name = "{named}": trains the weights themselves, and those of {packed} are packed into few bits, whose codes have no '
            "gradient; set base.bits = 16 and leave base.embedding_bits and base.head_bits at 16"
        )
    model.requires_grad_(True)
    model.is_itself_trained = True


def is_itself_trained(model: nn.Module) -> bool:
    """Return whether ``model``'s own weights are what a method has trained."""
    return getattr(model, "is_itself_trained", False)


def adapt_linears(model: nn.Module, targets: Targets, wrap: Callable[[str, nn.Module], AdaptedLinear], key: str = "method.targets") -> None:
    """Replace every linear that ``targets``, the value of ``key``, names by ``wrap(name, linear)``.

    Raises:
        RecipeError: a target names no linear of this model.
    """
    for name in select_linears(model, targets, key):
        put_module(model, name, wrap(name, model.get_submodule(name)))


def dtype_and_device(linear: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return the dtype that ``linear``, of any storage or adapted already, computes in, and where its weight lies."""
    own = linear.frozen if isinstance(linear, AdaptedLinear) else linear
    return compute_dtype(own), own.weight.device


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` into ``model`` in the place of what has the dotted ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def select_linears(model: nn.Module, targets: Targets, key: str = "method.targets") -> list[str]:
    """Return the dotted names of the linears that ``targets``, the value of ``key``, names, in model order.

    "all-linear": every linear inside the decoder blocks (not the output head); "attention": those of the attention
    modules; otherwise leaf names ("q_proj") or patterns with * and ? for leaf or whole names ("model.layers.1?.*").

    Raises:
        RecipeError: a target names no linear of this model.
    """
    linears = [name for name, module in outer_modules(model) if is_linear(module) or isinstance(module, AdaptedLinear)]
    head = model.get_output_embeddings()
    inside = [name for name in linears if model.get_submodule(name) is not head]
    if targets == "all-linear":
        return inside
    if targets == "attention":
        return [name for name in inside if _in_attention(model, name)]
    wanted = (targets,) if isinstance(targets, str) else targets
    problems = [problem for target in wanted if (problem := _unmatched(key, target, linears))]
    if problems:
        raise RecipeError(problems)
    return [name for name in linears if any(matches(name, target) for target in wanted)]


def matches(name: str, pattern: str) -> bool:
    """Return whether a layer's dotted ``name``, or its last part, is ``pattern`` (with * and ? and [..])."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def _in_attention(model: nn.Module, name: str) -> bool:
    parent = name.rpartition(".")[0]
    return "attention" in type(model.get_submodule(parent)).__name__.lower()


def short_names(model: nn.Module, layers: list[str]) -> list[str]:
    """Return the leaf names of ``layers`` where they say exactly which layers of ``model`` are meant; else the whole names."""
    leaves = {name.rpartition(".")[2] for name in layers}
    same_leaf = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves]
    return sorted(leaves) if len(same_leaf) == len(layers) else list(layers)


def _unmatched(key: str, target: str, linears: list[str]) -> str | None:
    """Return what is wrong with a target that names no linear, or None."""
    if any(matches(name, target) for name in linears):
        return None
    leaves = sorted({name.rpartition(".")[2] for name in linears})
    close = get_close_matches(target, [*leaves, "all-linear", "attention"], n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"this model has: {', '.join(leaves)}"
    return f'{key}: no linear layer is called "{shown(target)}"; {hint}'
