"""A run's own plan: made from its rows before a weight is read, held against its device, and afterwards against what was measured."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from qlite import device
from qlite.data.batches import Batch, TokenBatches
from qlite.data.dataset import DataSet
from qlite.errors import QliteError
from qlite.memory.ledger import Moment, Peak
from qlite.memory.plan import SLACK_BYTES, MemoryPlan
from qlite.model.shapes import BaseShapes, base_shapes
from qlite.recipe.schema import Recipe
from qlite.training.forecast import STEP, Workload, answers_work, forecast, largest, one_row
from qlite.training.step import general_advice
from qlite.training.ways_out import ways_out
from qlite.units import format_bytes

Told = Callable[[str, int, int], None]
"""Hears (phase, done, of all)."""


@dataclass(frozen=True)
class Planner:
    """Plans one recipe on one device."""

    recipe: Recipe
    where: torch.device
    told: Told

    @cached_property
    def shapes(self) -> BaseShapes:
        """The base's shapes, from its files' headers."""
        return base_shapes(self.recipe.base, self.told)

    def plan_run(self, data: DataSet, batches: TokenBatches, note: Callable[[str], None]) -> MemoryPlan | None:
        """Return the plan of a run over ``data``, if memory.plan asks for one; ``note`` hears what it says.

        Raises:
            MachineError: the run does not fit, and memory.plan is "require".
        """
        if self.recipe.memory.plan == "off":
            return None
        work = work_of(self.recipe, data, batches)
        plan = self.plan(work)
        if self.recipe.memory.plan == "require":
            self.require(plan, work)
        note(f"memory: {plan}")
        return plan

    def plan(self, work: Workload) -> MemoryPlan:
        """Return what ``work`` takes, against what the device has free now."""
        self.told("plan the memory", 0, 1)
        # The context of a card is there by now, and its bytes are not free; on a CPU the process as it is now is what the tensors add to.
        free, outside = device.free_memory(self.where), SLACK_BYTES if self.where.type == "cuda" else 0
        peaks = forecast(self.recipe, self.shapes, work).peaks()
        self.told("plan the memory", 1, 1)
        return MemoryPlan(peaks, free, f"{device.describe(self.where)} as it is now", outside)

    def require(self, plan: MemoryPlan, work: Workload) -> None:
        """Raise MachineError, with ways out and their peaks, if ``plan`` of ``work`` does not fit."""
        if not plan.fits:
            plan.require_fits([*self._lines(plan, work), 'Or begin all the same, with memory.plan = "tell"'])

    def advice(self, rows: int, tokens: int) -> list[str]:
        """Return ways out of having no room for ``rows`` lines of ``tokens`` tokens, a line each, with the peak that each would leave."""
        work = Workload(Batch.of([one_row(tokens)] * rows, 0))
        try:
            plan = self.plan(work)
        except (QliteError, MemoryError):  # with the memory as full as it is
            return general_advice(rows, tokens)
        planned = f"by plan such a step takes {format_bytes(plan.phases[STEP].bytes)} of tensors. Ways out, and what each would take:"
        return [planned, *self._lines(plan, work)]

    def _lines(self, plan: MemoryPlan, work: Workload) -> list[str]:
        rows, tokens = work.train.input_ids.shape
        found = ways_out(self.recipe, self.shapes, plan, lambda changed: _smaller(changed, self.recipe, rows, tokens), self._tracing)
        return [f"  {way}" for way in sorted(found, key=lambda way: way.peak)]

    def _tracing(self, done: int, total: int) -> None:
        self.told("trace what could be changed", done, total)


def work_of(recipe: Recipe, data: DataSet, batches: TokenBatches) -> Workload:
    """Return the largest pieces of work of a run over ``data``: its largest micro-batch comes first."""
    rows = sorted((data.test[index] for index in range(len(data.test))), key=len, reverse=True)[: recipe.train.micro_batch]
    held_out = Batch.of(rows, data.encoder.pad_id) if rows else None
    asked = range(min(recipe.train.exact_match_rows, len(data.test)))
    prompts = max([data.test[index].answer_start for index in asked], default=64)
    return Workload(batches.step(1)[0], held_out, answers_work(recipe, prompts))


def compared(plan: MemoryPlan | None, moments: dict[Moment, Peak], process: int) -> dict:
    """Return plan against measured, by phase and term, in bytes; ``process``: the most that the process held."""
    measured = {phase: peak.as_record() for phase, peak in largest(moments).items()}
    return {"planned": plan.as_record() if plan else None, "measured": measured, "process_peak": process}


def planned_and_measured(record: dict) -> Iterable[tuple[str, int, int]]:
    """Yield (phase, planned bytes, measured bytes) of what ``compared`` returned, for the phases that both know."""
    planned = (record["planned"] or {"phases": {}})["phases"]
    for phase, peak in record["measured"].items():
        if phase in planned:
            yield phase, planned[phase]["bytes"], peak["bytes"]


def _smaller(changed: Recipe, recipe: Recipe, rows: int, tokens: int) -> Workload:
    """Return the work of ``rows`` lines of ``tokens`` tokens as ``changed`` would cut it."""
    fewer = max(1, rows * changed.train.micro_batch // recipe.train.micro_batch)
    return Workload(Batch.of([one_row(max(2, tokens * changed.train.tokens // recipe.train.tokens))] * fewer, 0))
