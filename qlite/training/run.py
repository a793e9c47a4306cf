"""The main path: recipe -> base (quantised, frozen) -> method -> data -> steps -> adapter. Read this file first."""

from pathlib import Path

from qlite.data.figures import overview
from qlite.errors import RecipeError
from qlite.files import sweep
from qlite.lock import held
from qlite.methods.base import trainable_count
from qlite.recipe.schema import Recipe
from qlite.training import disk
from qlite.training.budget import as_begun, within_budget
from qlite.training.console import RunConsole
from qlite.training.limits import Limits
from qlite.training.logging import Loggers
from qlite.training.meter import Meter
from qlite.training.parts import Machine, Parts, assemble, load_base, read_rows
from qlite.training.report import Broadcast, Observer, SpillWatch
from qlite.training.run_folder import RunFolder
from qlite.training.run_report import leave_report
from qlite.training.state import TrainState
from qlite.training.steps import Answered, answer, take_steps
from qlite.training.summary import summarise


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


def train(recipe: Recipe, run: RunFolder, console: Observer, fresh: bool = False) -> None:
    """Train what ``recipe`` says into ``run``, going on from its newest checkpoint if it has one and not ``fresh``.

    Raises:
        QliteError: the recipe, the data, the model's files or the machine do not allow it.
    """
    parts = prepare(recipe, console)
    observer, loggers, state = start(parts, run, console, fresh)
    with loggers.going_on_after(state.step):
        state = take_steps(parts.recipe, parts, run, observer, state)
        finish(parts, run, observer, console, state)


def start(
    parts: Parts, run: RunFolder, console: Observer, fresh: bool, known: Answered | None = None
) -> tuple[Broadcast, Loggers, TrainState]:
    """Begin ``run`` or go on with it; return who is told of its steps, the loggers among them, and where it stands.

    ``known``: what other runs that begin as this one does have answered before their first step.
    """
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
    run.records.may_lose_lines = recipe.output.on_full_disk == "continue"
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
        parts.begin()
        answer(recipe, parts, observer, 0, known)
    return observer, loggers, state


def finish(parts: Parts, run: RunFolder, observer: Observer, console: Observer, state: TrainState) -> None:
    """Write what ``run`` has made, with its last answers and its report."""
    recipe = parts.recipe
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
    # The data first: what is wrong with it is known before a weight is read.
    machine = Machine.of(recipe)
    rows = read_rows(recipe, console)
    rows = rows.settled(machine.where, console)
    meter = Meter(machine.where)
    meter.plan = rows.planner(machine.where, console).plan_run(rows.data, rows.batches, rows.notes.append)
    if meter.plan:
        disk.require_room(recipe.output, disk.planned_bytes(meter.plan))
    base, machine = load_base(rows.recipe, machine, console, meter, rows.notes)
    return assemble(rows, base, base.model, machine, meter, console)
