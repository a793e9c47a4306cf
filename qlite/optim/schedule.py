"""The learning rate over a run: warm-up, then constant, linear or cosine decay."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from qlite.errors import RecipeError
from qlite.table import Table


@dataclass(frozen=True, kw_only=True)
class Schedule(Table):
    """How the learning rate changes from step to step."""

    name: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises in equal parts from 0 to optimizer.lr."""
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end of a decay, as a share of optimizer.lr."""

    def check(self, steps: int) -> None:
        """Raise RecipeError if a run of ``steps`` steps would end within its warm-up."""
        if self.warmup_steps >= steps:
            raise RecipeError(
                f"schedule.warmup_steps = {self.warmup_steps}: not less than the run's {steps} steps; lower it or train longer"
            )

    def factor(self, step: int, steps: int) -> float:
        """Return the factor on the learning rate in ``step`` (counted from 1) of ``steps``, in 0 .. 1.

        The last step of the warm-up runs at 1; the decay reaches ``final_ratio`` one step after the last.
        """
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        if self.name == "constant":
            return 1.0
        done = (step - 1 - self.warmup_steps) / max(1, steps - self.warmup_steps)
        left = 1 - done if self.name == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final_ratio + (1 - self.final_ratio) * left
