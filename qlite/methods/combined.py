"""Several methods on one model, as the LoRA paper says that they can be: "orthogonal to many prior methods" (arXiv:2106.09685, section 1).

Each puts its own tensors into the model; where two adapt one linear, the later stands on the earlier.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlite.errors import RecipeError
from qlite.methods.base import Method, Original, Stepping, grouped, trainable_tensors


@dataclass(frozen=True, kw_only=True)
class Combined(Method):
    """Several methods at once."""

    name: ClassVar[str] = "combined"
    parts: tuple[Method, ...]
    """No two of one name."""

    @property
    def each(self) -> tuple[Method, ...]:
        return self.parts

    @property
    def words(self) -> str:
        return " + ".join(part.words for part in self.parts)

    @property
    def is_mergeable(self) -> bool:
        return all(part.is_mergeable for part in self.parts)

    @property
    def positions(self) -> int:
        return sum(part.positions for part in self.parts)

    def having(self, key: str, value: object) -> "Combined":
        owner, rest = self._owner(key)
        return replace(self, parts=tuple(part.having(rest, value) if part is owner else part for part in self.parts))

    def get(self, key: str) -> object:
        owner, rest = self._owner(key)
        return owner.get(rest)

    def _owner(self, key: str) -> tuple[Method, str]:
        """Return the part whose ``key`` it is, "lora.rank", and what that calls it."""
        name, _, rest = key.partition(".")
        for part in self.parts:
            if part.name == name and rest in {field.name for field in fields(part)}:
                return part, rest
        parts = ", ".join(f"method.{part.name}" for part in self.parts)
        raise RecipeError(f"method.{key}: no such key; several methods have theirs in tables of their own: {parts}")

    def resolved(self, tokenizer: PreTrainedTokenizerBase | None) -> "Combined":
        return replace(self, parts=tuple(_resolved(part, tokenizer) for part in self.parts))

    def check(self, steps: int) -> None:
        for part in self.parts:
            with _in_its_table(part):
                part.check(steps)

    def attach(self, model: nn.Module) -> None:
        # What computes with a frozen linear's own weight stands nearest to it.
        for part in sorted(self.parts, key=lambda part: not part.needs_plain_linears):
            others = set(trainable_tensors(model).values())
            with _in_its_table(part):
                part.attach(model)
            for module in model.modules():
                if any(tensor.requires_grad and tensor not in others for tensor in module.parameters(recurse=False)):
                    module.of_part = part.name

    def start(self, model: nn.Module, original: Original) -> None:
        for part in self.parts:
            part.start(model, original)

    def settle(self, model: nn.Module, original: Original) -> None:
        for part in self.parts:
            part.settle(model, original)

    def param_groups(self, model: nn.Module, lr: float) -> list[dict]:
        """Return the groups of what ``attach`` has put into ``model``: each tensor has its own part's options."""
        parts = {part.name: part for part in self.parts}
        owners = {tensor: module for module in model.modules() for tensor in module.parameters(recurse=False)}

        def options_of(name: str, tensor: nn.Parameter) -> dict[str, object]:
            part = parts[owners[tensor].of_part]
            own = part.options_of(name, tensor)
            return {**own, "part": part.name} if _has_factor(part) else own

        return grouped(trainable_tensors(model), lr, options_of)

    def part_factors(self, step: int, steps: int) -> dict[str, float]:
        return {part.name: part.lr_factor(step, steps) for part in self.parts if _has_factor(part)}

    def penalty(self, model: nn.Module) -> Tensor | None:
        found = [term for part in self.parts if (term := part.penalty(model)) is not None]
        return sum(found[1:], found[0]) if found else None

    def before_step(self, model: nn.Module, optimizer: Stepping, step: int, steps: int) -> None:
        for part in self.parts:
            with _in_its_table(part):
                part.before_step(model, optimizer, step, steps)

    def after_step(self, model: nn.Module, optimizer: Stepping, step: int, steps: int) -> None:
        for part in self.parts:
            part.after_step(model, optimizer, step, steps)

    def findings(self, model: nn.Module) -> list[str]:
        return [line for part in self.parts for line in part.findings(model)]


def _has_factor(part: Method) -> bool:
    return type(part).lr_factor is not Method.lr_factor


def _resolved(part: Method, tokenizer: PreTrainedTokenizerBase | None) -> Method:
    with _in_its_table(part):
        return part.resolved(tokenizer)


@contextmanager
def _in_its_table(part: Method) -> Iterator[None]:
    """Let what ``part`` says of its keys name the table in which they stand: "method.rank" is "method.lora.rank" here."""
    keys = "|".join(field.name for field in fields(part))
    try:
        yield
    except RecipeError as error:
        raise RecipeError([re.sub(rf"\bmethod\.({keys})\b", rf"method.{part.name}.\1", problem) for problem in error.problems]) from error
