"""The main path: recipe -> base (quantised, frozen) -> method -> data -> steps -> adapter. Read this file first."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from qlite import device
from qlite.data.ahead import Ahead
from qlite.data.batches import Batch, TokenBatches
from qlite.data.dataset import DataSet
from qlite.errors import DiskError, Diverged
from qlite.files import held
from qlite.methods.base import trainable_count
from qlite.model.lowering import lower_memory
from qlite.model.packing import check_packing
from qlite.optim.build import FlatOptimizer
from qlite.recipe.read import read_recipe
from qlite.recipe.schema import Recipe
from qlite.stopping import Stopped, StoppedAtOnce, stopping_softly
from qlite.training import disk, divergence
from qlite.training.budget import as_begun, within_budget
from qlite.training.console import open_console
from qlite.training.evaluate import compare_answers, evaluate, require_answers, sample
from qlite.training.limits import Limits
from qlite.training.meter import Meter
from qlite.training.planning import Planner
from qlite.training.report import Broadcast, Observer, SpillWatch, StepReport, StopWatch, is_due
from qlite.training.run_folder import RunFolder, TrainState
from qlite.training.step import Stepper
from qlite.training.summary import print_summary, summarise
from qlite.units import format_count


def begin(path: Path, overrides: list[str], fresh: bool) -> None:
    """Train the recipe in the file ``path``, with ``overrides`` over it, and show it on the terminal; go on with a run that is there.

    Raises:
        QliteError: the recipe, the data, the model's files or the machine do not allow it.
    """
    recipe = read_recipe(path, overrides).with_absolute_paths()
    run = RunFolder(Path(recipe.output.dir))
    title = f"qlite  {path.stem}  {Path(recipe.base.model).name}"
    with held(run.path), open_console(title) as console:
        recipe = within_budget(as_begun(recipe, run, fresh), run, fresh, console)
        if not fresh:
            run.check(recipe)
        if run.is_finished and not fresh:
            console.note(f"{run.path} is finished already. To train it anew: --fresh")
        else:
            train(recipe, run, console, fresh)
    print_summary(run)


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    recipe: Recipe
    """The run's own, with what "auto" has chosen."""
    model: PreTrainedModel
    data: DataSet
    batches: TokenBatches
    steps: int
    stepper: Stepper
    optimizer: FlatOptimizer
    meter: Meter
    machine: dict[str, str | int]
    notes: list[str]


def train(recipe: Recipe, run: RunFolder, console: Observer, fresh: bool = False) -> None:
    """Train what ``recipe`` says into ``run``, going on from its newest checkpoint if it has one and not ``fresh``.

    Raises:
        QliteError: the recipe, the data, the model's files or the machine do not allow it.
    """
    parts = prepare(recipe, console)
    recipe = parts.recipe
    # Only now is anything written or deleted: a mistyped path or target has shown itself by here.
    if fresh:
        run.discard()
    else:
        run.check(recipe)
        run.check_data(parts.data.identity)
    differences = run.changes(recipe)
    changed = run.begin(recipe, parts.data, parts.machine)
    observer = Broadcast(console, run, SpillWatch(console, run))
    state = run.resume(parts.model, parts.optimizer, observer.note)
    run.rotate(recipe.output.keep)  # a kill may have come between a save and this
    for note in parts.notes:
        observer.note(note)
    parts.stepper.tell = observer.note
    for difference in differences:
        observer.note(f"since the run began the recipe has changed: {difference}")
    if state.step:
        # The smallest chunk that a full memory has asked for, unless the user now asks for another.
        learned = 0 if any(text.startswith("memory.loss_chunk:") for text in differences) else state.loss_chunk
        parts.stepper.limits = Limits(learned or recipe.memory.loss_chunk, state.most_tokens)
        observer.note(f"going on after step {state.step}")
        if changed:
            observer.note(f"since the run began the machine has changed, so its last bits may, too: {'; '.join(changed)}")
    else:
        answer(recipe, parts, observer, 0)

    state = take_steps(recipe, parts, run, observer, state)
    if recipe.output.adapter == "best" and state.best_step:
        run.load_best(state, parts.model)
        observer.note(f"the adapter is that of step {state.best_step}, with the lowest held-out loss: {state.best_loss:.4f}")
    run.write_adapter(recipe, parts.model)
    answer(recipe, parts, observer, state.step)
    compared = run.write_memory(parts.meter.compared())
    run.finish(summarise(run.records(), parts.meter.read(), compared, parts.data.system, state))


def prepare(recipe: Recipe, console: Observer) -> Parts:
    """Read, check and build all that ``recipe`` names. Nothing is written but caches."""
    where = device.pick_device(recipe.parallel.device)
    threads = device.set_threads(recipe.parallel.threads)
    device.keep_freed_memory()
    meter = Meter(where)
    plan, notes = recipe.train, []
    # The data first: what is wrong with it is known before a weight is read.
    data = recipe.data.load(recipe.base.tokenizer(console.phase), plan.tokens, notes.append, console.phase)
    data.require_sound()
    require_answers(data, plan)
    batches = plan.batches(data)
    steps = plan.steps or plan.epochs * batches.steps_per_epoch
    recipe.schedule.check(steps)
    asked, recipe = recipe, Planner(recipe, where, console.phase).settled(data, batches)
    if recipe != asked:
        notes.append(f'memory.checkpointing = "auto": "{recipe.memory.checkpointing}"')
    planner = Planner(recipe, where, console.phase)
    meter.plan = planner.plan_run(data, batches, notes.append)
    if meter.plan:
        disk.require_room(recipe.output, disk.planned_bytes(meter.plan))
    with meter.loading():
        model = recipe.base.load(where, console.phase, recipe.memory).model
    kernels = recipe.base.compile(where, console.phase)
    device.seed_all(plan.seed)
    with meter.attaching():
        recipe.method.attach(model)
    if "not compiled" in kernels:
        notes.append(f"norms, rotary positions and SwiGLU are {kernels}")
    notes.append(f"{device.describe(where)}; {recipe.method.name}: {format_count(trainable_count(model))} trained parameters")
    lower_memory(model, recipe.memory, where)
    if plan.packing:
        check_packing(model)
    stepper = Stepper(model, recipe.method, recipe.memory.loss_chunk, where, planner.advice)
    optimizer = recipe.optimizer.build(recipe.method.param_groups(model, recipe.optimizer.lr), where, notes.append)
    meter.follow(stepper, optimizer)
    disk.require_room(recipe.output, disk.checkpoint_bytes(model, optimizer))
    machine = {"device": device.describe(where), "threads": threads, "kernels": kernels}
    return Parts(recipe, model, data, batches, steps, stepper, optimizer, meter, machine, notes)


def take_steps(recipe: Recipe, parts: Parts, run: RunFolder, observer: Observer, state: TrainState) -> TrainState:
    """Train on from ``state`` to the last step, or until the held-out loss has stopped falling; return the state then.

    Raises:
        Stopped: a signal asked for it; what was learned is in a checkpoint.
        Diverged: too many steps in a row could not be made.
    """
    plan, batches = recipe.train, Ahead(parts.batches, parts.steps)
    with stopping_softly() as stop:
        parts.stepper.between = stop.check
        observer = Broadcast(observer, StopWatch(stop.check))
        try:
            if state.step and state.measured < state.step and is_due(plan.eval_every, state.step, parts.steps):
                state = measure(recipe, parts, run, observer, state)
            for step in range(state.step + 1, parts.steps + 1):
                if plan.patience and state.stale >= plan.patience:
                    told = f"{state.stale} evaluations without a lower held-out loss (train.patience)"
                    observer.note(f"stopped after step {state.step}: {told}")
                    break
                limits = replace(parts.stepper.limits)
                state = advance(recipe, parts, run, observer, state, batches.step(step))
                if is_due(plan.eval_every, step, parts.steps):
                    state = measure(recipe, parts, run, observer, state)
                is_last = plan.patience and state.stale >= plan.patience
                # What was learned of the machine is kept at once: it decides how the next steps are cut, and so their bits.
                has_learned = parts.stepper.limits != limits
                if has_learned or is_last or is_due(recipe.output.save_every, step, parts.steps):
                    save(recipe, parts, run, observer, state)
        except StoppedAtOnce:
            raise
        except Stopped as stopped:
            parts.optimizer.zero_grad()
            if state.step:
                save(recipe, parts, run, observer, state)
            observer.note(f"stopped by {stopped.name} after step {state.step}")
            raise
    return state


def advance(recipe: Recipe, parts: Parts, run: RunFolder, observer: Observer, state: TrainState, batches: list[Batch]) -> TrainState:
    """Make the step after ``state``, or skip it where its loss or gradient is no number; return the state then."""
    plan, step, started = recipe.train, state.step + 1, time.perf_counter()
    lr, seed = parts.optimizer.set_lr_factor(recipe.schedule.factor(step, parts.steps)), (plan.seed, step)
    try:
        with parts.meter.step():
            most_loss = divergence.most_loss(plan, state)
            result = parts.stepper.step(batches, parts.optimizer, plan.clip_norm, seed, most_loss)
    except Diverged as fault:
        rows = divergence.rows_of(step, parts.batches, parts.data)
        state = replace(state, step=step, **vars(parts.stepper.limits))
        state, told = divergence.after_fault(plan, state, fault, rows, run)
        observer.note(told)
        return state
    recipe.method.after_step(parts.model, parts.optimizer, step)
    seconds, epoch = time.perf_counter() - started, step / parts.batches.steps_per_epoch
    report = StepReport(**vars(result), step=step, steps=parts.steps, epoch=epoch, lr=lr, seconds=seconds, memory=parts.meter.read())
    observer.step(report)
    state = replace(state, step=step, tokens=state.tokens + report.tokens, **vars(parts.stepper.limits))
    return divergence.after_loss(plan, state, report.loss)


def save(recipe: Recipe, parts: Parts, run: RunFolder, observer: Observer, state: TrainState) -> None:
    """Write a checkpoint of ``state``, if there is none yet. Raises DiskError, unless output.on_full_disk is "continue"."""
    try:
        run.save(state, parts.model, parts.optimizer, recipe.output.keep)
        run.write_memory(parts.meter.compared())
    except DiskError as error:
        if recipe.output.on_full_disk == "stop":
            raise
        observer.note(f'{error}. Going on without it (output.on_full_disk = "continue")')


def measure(recipe: Recipe, parts: Parts, run: RunFolder, observer: Observer, state: TrainState) -> TrainState:
    """Evaluate on the held-out rows and let the model answer the recipe's samples; return the state with what was found."""
    if recipe.train.samples:
        with parts.meter.answering():
            observer.sampled(sample(parts.model, parts.data, recipe.train, state.step, observer))
    if not len(parts.data.test):
        return replace(state, measured=state.step)
    with parts.meter.evaluating():
        evaluation = evaluate(parts.stepper, parts.data, recipe.train, state.step, observer)
    observer.evaluated(evaluation)
    state = state.after(evaluation.loss)
    if recipe.output.adapter == "best" and state.best_step == state.step:
        run.save_best(state, parts.model)
    return state


def answer(recipe: Recipe, parts: Parts, observer: Observer, step: int) -> None:
    """Let the model answer held-out prompts, if the recipe asks for it."""
    if recipe.train.exact_match_rows:
        with parts.meter.answering():
            observer.answered(compare_answers(parts.model, parts.data, recipe.train, step, observer))
