"""A run's own plan: made from its rows before a weight is read, held against its device, and afterwards against what was measured."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch

from qlite import device
from qlite.data.batches import Batch, TokenBatches
from qlite.data.dataset import DataSet
from qlite.errors import QliteError
from qlite.memory.ledger import Moment, Peak
from qlite.memory.plan import MemoryPlan
from qlite.model.product_attention import traced_for
from qlite.model.shapes import BaseShapes, base_shapes
from qlite.recipe.schema import Recipe
from qlite.training.automatic import settled
from qlite.training.evaluate import sample_prompts
from qlite.training.forecast import EVALUATION, PHASES, STEP, Workload, answers_work, largest, one_row
from qlite.training.kept_plans import kept_forecast
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

    def settled(self, data: DataSet, batches: TokenBatches) -> Recipe:
        """Return the recipe with memory.checkpointing chosen for a run over ``data``, if that is "auto"."""
        return settled(self.recipe, lambda changed: self.plan(work_of(changed, data, batches), changed))

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

    def plan(self, work: Workload, recipe: Recipe | None = None) -> MemoryPlan:
        """Return what ``work`` takes, by another ``recipe`` of the same base if one is given, against what the device has free now."""
        self.told("plan the memory", 0, 1)
        free, words = device.free_memory(self.where), f"{device.describe(self.where)} as it is now"
        with traced_for(self.where):
            found = kept_forecast(recipe or self.recipe, self.shapes, work)
        self.told("plan the memory", 1, 1)
        if self.where.type == "cuda":  # whose context is there by now: its bytes are not free
            return MemoryPlan.on_card(found.peaks(), free, words, found.int8_bytes, has_context=True)
        return MemoryPlan(found.peaks(), free, words)  # a CPU's process as it is now is what the tensors add to

    def require(self, plan: MemoryPlan, work: Workload) -> None:
        """Raise MachineError, with ways out and their peaks, if ``plan`` of ``work`` does not fit."""
        if not plan.fits:
            plan.require_fits([*self._lines(plan.peak.bytes, work, PHASES, plan), 'Or begin all the same, with memory.plan = "tell"'])

    def advice(self, rows: int, tokens: int, is_training: bool = True) -> list[str]:
        """Return ways out of having no room for ``rows`` lines of ``tokens`` tokens, a line each, with the peak that each would leave.

        In training or, if not, in a pass without gradients.
        """
        batch, phase = Batch.of([one_row(tokens)] * rows, 0), STEP if is_training else EVALUATION
        work, lines = Workload(batch, None if is_training else batch), general_advice(self.recipe.method, rows, tokens)
        # With the memory as full as it is, a plan may find no room itself.
        with device.Attempt(), suppress(QliteError):
            peak = self.plan(work).phases[phase].bytes
            planned = f"by plan such a pass takes {format_bytes(peak)} of tensors. Ways out, and what each would take:"
            lines = [planned, *self._lines(peak, work, (phase,))]
        return lines

    def _lines(self, before: int, work: Workload, phases: tuple[str, ...], plan: MemoryPlan | None = None) -> list[str]:
        """Return the ways out, those that need least first; what alone fits the device of ``plan`` is marked."""
        with traced_for(self.where):
            found = ways_out(self.recipe, self.shapes, before, lambda changed: _smaller(changed, self.recipe, work), phases, self._tracing)
        marks = {True: "fits  ", False: "      ", None: ""}
        return [f"  {marks[plan and plan.room_for(way.peak)]}{way}" for way in sorted(found, key=lambda way: way.peak)]

    def _tracing(self, done: int, total: int) -> None:
        self.told("trace what could be changed", done, total)


def work_of(recipe: Recipe, data: DataSet, batches: TokenBatches) -> Workload:
    """Return the largest pieces of work of a run over ``data``."""
    rows = sorted((data.test[index] for index in range(len(data.test))), key=len, reverse=True)[: recipe.train.micro_batch]
    held_out = Batch.of(rows, data.encoder.pad_id) if rows else None
    asked = range(min(recipe.train.exact_match_rows, len(data.test)))
    prompts = [*(data.test[index].answer_start for index in asked), *map(len, sample_prompts(data, recipe.train))]
    return Workload(_largest_batch(batches), held_out, answers_work(recipe, max(prompts, default=1)))


def _largest_batch(batches: TokenBatches) -> Batch:
    """Return the first micro-batch, the largest of its epoch, or what another epoch may have: as many rows, as long as the longest."""
    first, rows = batches.step(1)[0], min(batches.micro_batch, len(batches.lengths))
    longest = int(batches.lengths.max())
    return first if batches.pack_tokens or first.size >= rows * longest else Batch.of([one_row(longest)] * rows, 0)


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


def _smaller(changed: Recipe, recipe: Recipe, work: Workload) -> Workload:
    """Return ``work`` as ``changed`` would cut it."""

    def shorter(tokens: int) -> int:
        return max(2, tokens * changed.train.tokens // recipe.train.tokens)

    def cut(batch: Batch) -> Batch:
        rows, tokens = batch.input_ids.shape
        return Batch.of([one_row(shorter(tokens))] * max(1, rows * changed.train.micro_batch // recipe.train.micro_batch), 0)

    held_out, answers = work.held_out and cut(work.held_out), work.answers and answers_work(changed, shorter(work.answers[1]))
    return Workload(cut(work.train), held_out, answers)
