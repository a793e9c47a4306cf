"""A sweep's runs, trained together over one base: begun or gone on with, planned, stepped and finished, each in its own folder."""

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from qlite.errors import Diverged
from qlite.files import sweep
from qlite.lock import held
from qlite.loggers import require_loggers
from qlite.memory.plan import MemoryPlan
from qlite.methods.together import Several, join
from qlite.methods.views import view_of
from qlite.model.blocks import decoder_blocks
from qlite.model.lowering import lower_memory
from qlite.optim.build import FlatOptimizer
from qlite.recipe.schema import Recipe
from qlite.training import disk
from qlite.training.automatic import settled
from qlite.training.budget import as_begun
from qlite.training.forecast import Workload, adopt_all
from qlite.training.meter import Meter
from qlite.training.parts import Machine, Parts, Rows, assemble, load_base, read_rows
from qlite.training.planning import Planner, work_of
from qlite.training.report import Observer
from qlite.training.run import finish, start
from qlite.training.run_folder import RunFolder
from qlite.training.run_report import leave_report
from qlite.training.step import Stepper
from qlite.training.together import Member, Together, side_by_side, take_steps_together

WAYS_OUT = (
    "Train fewer runs together (the others follow with the same command, once their tables are back), or lower train.micro_batch,",
    'train.tokens or method.rank; memory.checkpointing = "block" keeps least',
)


class SweepConsole(Observer, Protocol):
    """Where a sweep is shown: an observer of what concerns all runs, with one for each."""

    def of(self, name: str) -> Observer:
        """Return the observer of the run called ``name``."""


def begin_sweep(recipes: dict[str, Recipe], fresh: bool, console: SweepConsole) -> dict[str, RunFolder]:
    """Train ``recipes`` together and show it on ``console``; go on with runs that are there. Return the finished runs by name.

    Raises:
        QliteError: the recipes, the data, the model's files or the machine do not allow it.
        Diverged: a run's loss was no number; the others are finished.
    """
    recipes = {name: recipe.with_absolute_paths() for name, recipe in recipes.items()}
    runs = {name: RunFolder(Path(recipe.output.dir)) for name, recipe in recipes.items()}
    with ExitStack() as stack:
        for name, run in runs.items():
            stack.enter_context(held(run.path))
            recipes[name] = as_begun(recipes[name], run, fresh)
            if not fresh:
                run.check(recipes[name])
        ended = [name for name, run in runs.items() if run.is_finished and not fresh]
        if ended:
            console.note(f"finished already: {', '.join(ended)}. To train them anew: --fresh")
        for name in ended:
            if not runs[name].report.exists():  # killed between its result and its report
                sweep(runs[name].path)
                leave_report(runs[name], console.note)
        left = {name: recipe for name, recipe in recipes.items() if name not in ended}
        if left:
            _train(left, runs, fresh, console)
    return runs


def _train(recipes: dict[str, Recipe], runs: dict[str, RunFolder], fresh: bool, console: SweepConsole) -> None:
    for recipe in recipes.values():
        require_loggers(recipe.output.loggers)
    machine = Machine.of(next(iter(recipes.values())))
    rows = {name: read_rows(recipe, console) for name, recipe in recipes.items()}
    rows, plan = planned(rows, machine.where, console)
    meter = JointMeter(machine.where)
    meter.plan = plan
    parts, together = assemble_together(list(rows.values()), machine, meter, console)
    for note in [note for note in parts[0].notes if all(note in own.notes for own in parts)]:
        console.note(note)
    with ExitStack() as stack:
        members, known = [], {}  # without a step all of them answer as the base does
        for number, (name, own) in enumerate(zip(rows, parts, strict=True)):
            observer, loggers, state = start(own, runs[name], console.of(name), fresh, known)
            stack.enter_context(loggers.going_on_after(state.step))
            members.append(Member(name, own, runs[name], observer, state, number))
        take_steps_together(members, together, console)
        for member in members:
            if member.failed is None:
                finish(member.parts, member.run, member.observer, console.of(member.name), member.state)
    failed = [f"{member.name}: {member.failed}" for member in members if member.failed is not None]
    if failed:
        raise Diverged("; ".join(failed))


def assemble_together(rows: list[Rows], machine: Machine, meter: "JointMeter", console: Observer) -> tuple[list[Parts], Together]:
    """Load the base of all ``rows`` and put each one's adapter on a view of it; return what each run is made of, and their joint passes."""
    first = rows[0]
    base, machine = load_base(first.recipe, machine, console, meter, first.notes)
    views = [view_of(base.model) for _ in rows]
    parts = [assemble(own, base, view, machine, meter, console) for own, view in zip(rows, views, strict=True)]
    together = Together(base.model, join(base.model, views), machine.where, len(views))
    lower_memory(base.model, first.recipe.memory, machine.where)
    together.stepping = meter.of(base.model)
    return parts, together


def planned(rows: dict[str, Rows], where: torch.device, console: Observer) -> tuple[dict[str, Rows], MemoryPlan | None]:
    """Return ``rows`` with what "auto" chooses for all, and the plan of the joint passes.

    Raises:
        MachineError: they do not fit, and memory.plan is "require".
    """
    first = next(iter(rows.values())).recipe
    counts = tuple(own.recipe.train.micro_batch for own in rows.values())
    several = Several(parts=tuple(own.method for own in rows.values()), rows=counts)
    joint = replace(first, method=several).having({"train.micro_batch": sum(counts)})
    planner, work = Planner(joint, where, console.phase), _work(list(rows.values()))
    chosen = settled(joint, partial(planner.plan, work)).memory.checkpointing
    if chosen != first.memory.checkpointing:
        console.note(f'memory.checkpointing = "auto": "{chosen}"')
    rows = {name: replace(own, recipe=own.recipe.having({"memory.checkpointing": chosen})) for name, own in rows.items()}
    if first.memory.plan == "off":
        return rows, None
    planner = replace(planner, recipe=joint.having({"memory.checkpointing": chosen}))
    plan = planner.plan(work)
    if first.memory.plan == "require":
        plan.require_fits([*WAYS_OUT, 'Or begin all the same, with memory.plan = "tell"'])
    console.note(f"memory: {plan}")
    disk.require_room(first.output, disk.planned_bytes(plan))  # the sum over all runs
    return rows, plan


def _work(rows: list[Rows]) -> Workload:
    """Return the largest pieces of work of runs that share their training passes, and evaluate and answer one after the other."""
    works = [work_of(own.recipe, own.data, own.batches) for own in rows]
    held_out = max((work.held_out for work in works if work.held_out), key=lambda batch: batch.size, default=None)
    answers = [work.answers for work in works if work.answers]
    largest = tuple(max(each) for each in zip(*answers, strict=True)) if answers else None
    return Workload(side_by_side([work.train for work in works]), held_out, largest)


class JointMeter(Meter):
    """One meter for all runs of a sweep: what they hold, they hold together."""

    def __init__(self, where: torch.device):
        super().__init__(where)
        self._optimizers: list[FlatOptimizer] = []

    def follow(self, stepper: Stepper, optimizer: FlatOptimizer) -> None:
        stepper.updating = self._updating
        self._optimizers.append(optimizer)

    def of(self, model: nn.Module):
        """Return what is to be entered around the passes of a step through ``model``, the joint one."""
        self._parts, self._blocks = (model, _All(self._optimizers)), list(decoder_blocks(model).values())
        adopt_all(self._ledger, *self._parts)
        return super().step

    def step(self):
        return nullcontext()  # of one run: its passes are the joint ones


class _All:
    """The optimizers of all runs, for who asks what they hold."""

    def __init__(self, optimizers: list[FlatOptimizer]):
        self._optimizers = optimizers

    @property
    def flats(self) -> list:
        return [flat for optimizer in self._optimizers for flat in optimizer.flats]

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        tensors = [optimizer.state()[0] for optimizer in self._optimizers]
        return {f"{number}.{name}": tensor for number, each in enumerate(tensors) for name, tensor in each.items()}, {}
