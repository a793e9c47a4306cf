"""What a run is made of: machine, rows, base, adapter, optimizer. Each is made by itself, so that several runs can share some."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from qlite import device
from qlite.data.batches import TokenBatches
from qlite.data.dataset import DataSet
from qlite.errors import RecipeError
from qlite.loggers import require_loggers
from qlite.methods.base import Method, longest_input, trainable_count
from qlite.model.load import LoadedBase
from qlite.model.lowering import lower_memory
from qlite.model.originals import original_weights
from qlite.model.packing import check_packing
from qlite.optim.build import FlatOptimizer
from qlite.recipe.schema import Recipe
from qlite.training import disk
from qlite.training.evaluate import require_answers
from qlite.training.meter import Meter
from qlite.training.planning import Planner
from qlite.training.provenance import provenance
from qlite.training.report import Observer
from qlite.training.step import Stepper
from qlite.units import format_bytes, format_count


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    recipe: Recipe
    """The run's own, with what "auto" has chosen."""
    model: PreTrainedModel
    begin: Callable[[], None]
    """Gives the method's tensors the first values that depend on the base's weights."""
    settle: Callable[[], None]
    """Brings the base into the state that the method's tensors, once loaded, say."""
    data: DataSet
    batches: TokenBatches
    steps: int
    stepper: Stepper
    optimizer: FlatOptimizer
    meter: Meter
    machine: dict[str, str | int]
    identity: dict[str, str]
    """What is behind data.train, data.test, data.template and base.model."""
    provenance: dict[str, str]
    """What the adapter will say of where it is from."""
    notes: list[str]


@dataclass(frozen=True)
class Machine:
    """Where a run computes, and with what kernels."""

    where: torch.device
    threads: int
    kernels: str = ""

    @classmethod
    def of(cls, recipe: Recipe) -> "Machine":
        """Choose the device of ``recipe``, and set its threads."""
        require_loggers(recipe.output.loggers)
        found = cls(device.pick_device(recipe.parallel.device), device.set_threads(recipe.parallel.threads))
        device.keep_freed_memory()
        return found

    def as_record(self) -> dict[str, str | int]:
        """Return it for the run's folder."""
        return {"device": device.describe(self.where), "threads": self.threads, "kernels": self.kernels}


@dataclass(frozen=True)
class Rows:
    """A recipe's rows, read and checked, and the steps they make."""

    recipe: Recipe
    method: Method
    """The recipe's, with the ids of the tokens that it names."""
    data: DataSet
    batches: TokenBatches
    steps: int
    notes: list[str]

    def planner(self, where: torch.device, console: Observer) -> Planner:
        """Return what plans the run's memory."""
        return Planner(self.recipe, where, console.phase)

    def settled(self, where: torch.device, console: Observer) -> "Rows":
        """Return the same with what "auto" chooses in the recipe."""
        recipe = self.planner(where, console).settled(self.data, self.batches)
        if recipe != self.recipe:
            self.notes.append(f'memory.checkpointing = "auto": "{recipe.memory.checkpointing}"')
        return replace(self, recipe=recipe)


def read_rows(recipe: Recipe, console: Observer) -> Rows:
    """Return the rows of ``recipe``. Raises QliteError with all that is wrong with them."""
    plan, notes = recipe.train, []
    tokenizer = recipe.base.tokenizer(console.phase)
    method = recipe.method.resolved(tokenizer)
    data = recipe.data.load(tokenizer, plan.tokens, notes.append, console.phase)
    data.require_sound()
    require_answers(data, plan)
    batches = plan.batches(data)
    steps = plan.steps or plan.epochs * batches.steps_per_epoch
    recipe.schedule.check(steps)
    method.check(steps)
    return Rows(recipe, method, data, batches, steps, notes)


def load_base(recipe: Recipe, machine: Machine, console: Observer, meter: Meter, notes: list[str]) -> tuple[LoadedBase, Machine]:
    """Return the base of ``recipe``, frozen, and ``machine`` with the kernels that were compiled for it."""
    with meter.loading():
        base = recipe.base.load(machine.where, console.phase, recipe.memory)
    machine = replace(machine, kernels=recipe.base.compile(machine.where, console.phase))
    if "not compiled" in machine.kernels:
        notes.append(f"norms, rotary positions and SwiGLU are {machine.kernels}")
    return base, machine


def require_positions(recipe: Recipe, model: PreTrainedModel) -> None:
    """Raise RecipeError if rows of ``recipe`` would reach beyond ``model``'s positions because its method takes some before them."""
    taken, limit = recipe.method.positions, longest_input(model, 0)
    if taken and limit is not None and recipe.train.tokens + taken > limit:
        way = f"set train.tokens = {limit - taken}, or lower its length" if taken < limit else "lower its length"
        raise RecipeError(
            f"train.tokens = {recipe.train.tokens}: the model reads {limit} positions at most, and {taken} of them are the prompt's; {way}"
        )


def assemble(rows: Rows, base: LoadedBase, model: PreTrainedModel, machine: Machine, meter: Meter, console: Observer) -> Parts:
    """Put the adapter of ``rows``' recipe on ``model``, which is ``base``'s or a view of it, and build what trains it."""
    recipe, where, notes = rows.recipe, machine.where, rows.notes
    require_positions(recipe, model)
    original, identity = original_weights(base), {**rows.data.identity, "base.model": base.identity}
    device.seed_all(recipe.train.seed)
    with meter.attaching():
        rows.method.attach(model)
    notes.append(f"{device.describe(where)}; {recipe.method.words}: {format_count(trainable_count(model))} trained parameters")
    lower_memory(model, recipe.memory, where)
    if recipe.train.packing:
        check_packing(model)
    stepper = Stepper(model, recipe.method, recipe.memory.loss_chunk, where, rows.planner(where, console).advice)
    optimizer = recipe.optimizer.build(recipe.method.param_groups(model, recipe.optimizer.lr), where, notes.append)
    meter.follow(stepper, optimizer)
    sizes = disk.checkpoint_bytes(model, optimizer)
    disk.require_room(recipe.output, sizes)
    if rows.method.trains_base:
        whole, state = map(format_bytes, sizes)
        notes.append(f"{rows.method.words}: the adapter is the whole model, {whole}; each checkpoint holds it and {state} more")
    begin, settle = (partial(hook, model, original) for hook in (rows.method.start, rows.method.settle))
    run = {"data": rows.data, "batches": rows.batches, "steps": rows.steps, "notes": notes}
    made = {"stepper": stepper, "optimizer": optimizer, "meter": meter, "machine": machine.as_record()}
    return Parts(recipe, model, begin, settle, identity=identity, provenance=provenance(recipe, base, identity), **run, **made)
