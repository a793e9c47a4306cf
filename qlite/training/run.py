"""The main path: recipe -> base (quantised, frozen) -> method -> data -> steps -> adapter. Read this file first."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from qlite import device
from qlite.data.batches import TokenBatches
from qlite.data.dataset import DataSet
from qlite.data.figures import overview
from qlite.errors import RecipeError
from qlite.files import sweep
from qlite.lock import held
from qlite.loggers import require_loggers
from qlite.methods.base import trainable_count
from qlite.model.lowering import lower_memory
from qlite.model.originals import original_weights
from qlite.model.packing import check_packing
from qlite.optim.build import FlatOptimizer
from qlite.recipe.schema import Recipe
from qlite.training import disk
from qlite.training.budget import as_begun, within_budget
from qlite.training.console import RunConsole
from qlite.training.evaluate import require_answers
from qlite.training.limits import Limits
from qlite.training.logging import Loggers
from qlite.training.meter import Meter
from qlite.training.planning import Planner
from qlite.training.provenance import provenance
from qlite.training.report import Broadcast, Observer, SpillWatch
from qlite.training.run_folder import RunFolder
from qlite.training.run_report import leave_report
from qlite.training.step import Stepper
from qlite.training.steps import answer, take_steps
from qlite.training.summary import summarise
from qlite.units import format_count


def begin(recipe: Recipe, fresh: bool, console: RunConsole) -> RunFolder:
    """Train ``recipe`` and show it on ``console``; go on with a run that is there. Return the finished run.

    Raises:
        QliteError: the recipe, the data, the model's files or the machine do not allow it.
    """
    if not recipe.output.dir:
        raise RecipeError('output.dir: is not given, and there is no recipe file to name the run after; give output.dir = "runs/mine"')
    recipe = recipe.with_absolute_paths()
    run = RunFolder(Path(recipe.output.dir))
    with held(run.path), console:
        recipe = within_budget(as_begun(recipe, run, fresh), run, fresh, console)
        if not fresh:
            run.check(recipe)
        if run.is_finished and not fresh:
            console.note(f"{run.path} is finished already. To train it anew: --fresh")
            if not run.report.exists():  # killed between its result and its report
                sweep(run.path)
                leave_report(run, console.note)
        else:
            train(recipe, run, console, fresh)
    return run


def title_of(recipe: Recipe) -> str:
    """Return what a run of ``recipe`` is headed with."""
    return f"qlite  {recipe.name}  {Path(recipe.base.model).name}"


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    recipe: Recipe
    """The run's own, with what "auto" has chosen."""
    model: PreTrainedModel
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


def train(recipe: Recipe, run: RunFolder, console: Observer, fresh: bool = False) -> None:
    """Train what ``recipe`` says into ``run``, going on from its newest checkpoint if it has one and not ``fresh``.

    Raises:
        QliteError: the recipe, the data, the model's files or the machine do not allow it.
    """
    parts = prepare(recipe, console)
    recipe = parts.recipe
    # Only now is anything written or deleted: a mistyped path or target has shown itself by here.
    if fresh and run.is_begun:
        run.discard()
    else:
        run.check(recipe)
        run.check_identity(parts.identity)
    differences = run.changes(recipe)
    changed = run.begin(recipe, parts.identity, parts.data.encoder.template, parts.machine)
    run.write_overview({"trained_parameters": trainable_count(parts.model), "parts": overview(parts.data)})
    loggers = Loggers(recipe, run, Broadcast(console, run).note)
    observer = Broadcast(console, run, SpillWatch(console, run), loggers)
    state = run.resume(parts.model, parts.optimizer, observer.note)
    run.rotate(recipe.output.keep)  # a kill may have come between a save and this
    for note in parts.notes:
        observer.note(note)
    parts.stepper.tell = observer.note
    for difference in differences:
        observer.note(f"since the run began the recipe has changed: {difference}")
    if state.step:
        parts.settle()
        # The smallest chunk that a full memory has asked for, unless the user now asks for another.
        learned = 0 if any(text.startswith("memory.loss_chunk:") for text in differences) else state.loss_chunk
        parts.stepper.limits = Limits(learned or recipe.memory.loss_chunk, state.most_tokens)
        observer.note(f"going on after step {state.step}")
        if changed:
            observer.note(f"since the run began the machine has changed, so its last bits may, too: {'; '.join(changed)}")
    else:
        answer(recipe, parts, observer, 0)

    with loggers.going_on_after(state.step):
        state = take_steps(recipe, parts, run, observer, state)
        if recipe.output.adapter == "best" and state.best_step:
            run.load_best(state, parts.model)
            observer.note(f"the adapter is that of step {state.best_step}, with the lowest held-out loss: {state.best_loss:.4f}")
        for finding in recipe.method.findings(parts.model):
            observer.note(finding)
        run.write_adapter(recipe, parts.model, parts.provenance)
        answer(recipe, parts, observer, state.step)
        compared = run.write_memory(parts.meter.compared())
        run.finish(summarise(run.records.read(), parts.meter.read(), compared, parts.data.system, state))
        leave_report(run, console.note)  # not to the records: the run is finished, whatever a full disk says now


def prepare(recipe: Recipe, console: Observer) -> Parts:
    """Read, check and build all that ``recipe`` names. Nothing is written but caches."""
    require_loggers(recipe.output.loggers)
    where = device.pick_device(recipe.parallel.device)
    threads = device.set_threads(recipe.parallel.threads)
    device.keep_freed_memory()
    meter = Meter(where)
    plan, notes = recipe.train, []
    # The data first: what is wrong with it is known before a weight is read.
    tokenizer = recipe.base.tokenizer(console.phase)
    method = recipe.method.resolved(tokenizer)
    data = recipe.data.load(tokenizer, plan.tokens, notes.append, console.phase)
    data.require_sound()
    require_answers(data, plan)
    batches = plan.batches(data)
    steps = plan.steps or plan.epochs * batches.steps_per_epoch
    recipe.schedule.check(steps)
    method.check(steps)
    asked, recipe = recipe, Planner(recipe, where, console.phase).settled(data, batches)
    if recipe != asked:
        notes.append(f'memory.checkpointing = "auto": "{recipe.memory.checkpointing}"')
    planner = Planner(recipe, where, console.phase)
    meter.plan = planner.plan_run(data, batches, notes.append)
    if meter.plan:
        disk.require_room(recipe.output, disk.planned_bytes(meter.plan))
    with meter.loading():
        base = recipe.base.load(where, console.phase, recipe.memory)
    model, identity = base.model, {**data.identity, "base.model": base.identity}
    kernels = recipe.base.compile(where, console.phase)
    device.seed_all(plan.seed)
    original = original_weights(base)
    with meter.attaching():
        method.attach(model)
        method.start(model, original)
    if "not compiled" in kernels:
        notes.append(f"norms, rotary positions and SwiGLU are {kernels}")
    notes.append(f"{device.describe(where)}; {recipe.method.words}: {format_count(trainable_count(model))} trained parameters")
    lower_memory(model, recipe.memory, where)
    if plan.packing:
        check_packing(model)
    stepper = Stepper(model, recipe.method, recipe.memory.loss_chunk, where, planner.advice)
    optimizer = recipe.optimizer.build(recipe.method.param_groups(model, recipe.optimizer.lr), where, notes.append)
    meter.follow(stepper, optimizer)
    disk.require_room(recipe.output, disk.checkpoint_bytes(model, optimizer))
    machine = {"device": device.describe(where), "threads": threads, "kernels": kernels}
    told = provenance(recipe, base, identity)
    settle = partial(method.settle, model, original)
    return Parts(recipe, model, settle, data, batches, steps, stepper, optimizer, meter, machine, identity, told, notes)
