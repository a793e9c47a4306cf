"""Step after step: each with its evaluation, its checkpoint, and an end in good order whatever ends it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from qlite.data.ahead import Ahead
from qlite.data.batches import Batch
from qlite.errors import DiskError, Diverged, QliteError
from qlite.recipe.schema import Recipe
from qlite.stopping import Stopped, StoppedAtOnce, stopping_softly
from qlite.training import divergence
from qlite.training.evaluate import compare_answers, evaluate, sample
from qlite.training.limits import Limits
from qlite.training.report import AnswerReport, Broadcast, Observer, StepReport, StopWatch, is_due
from qlite.training.run_folder import UNEVALUATED, RunFolder
from qlite.training.state import TrainState

if TYPE_CHECKING:
    from qlite.training.parts import Parts


def take_steps(recipe: Recipe, parts: "Parts", run: RunFolder, observer: Observer, state: TrainState) -> TrainState:
    """Train on from ``state`` to the last step, or until the held-out loss has stopped falling; return the state then.

    Raises:
        Stopped: a signal asked for it; what was learned is in a checkpoint.
        Diverged: too many steps in a row could not be made.
    """
    batches = Ahead(parts.batches, parts.steps)
    with stopping_softly(partial(announce, observer)) as stop:
        parts.stepper.between = stop.check
        observer = Broadcast(observer, StopWatch(stop.check))
        try:
            state = catch_up(recipe, parts, run, observer, state)
            while goes_on(recipe, parts, observer, state):
                limits = replace(parts.stepper.limits)
                # One after the other: what is stopped in an evaluation has made its step.
                state = advance(recipe, parts, run, observer, state, batches.step(state.step + 1))
                state = conclude(recipe, parts, run, observer, state, limits)
            stop.check()  # what came during the last step is heard, too
        except StoppedAtOnce:
            raise
        except Stopped as stopped:
            parts.optimizer.zero_grad()
            if state.step:
                save(recipe, parts, run, observer, state)
            observer.note(f"stopped by {stopped.name} after step {state.step}")
            raise
    divergence.require_any_step(state)
    return state


def catch_up(recipe: Recipe, parts: "Parts", run: RunFolder, observer: Observer, state: TrainState) -> TrainState:
    """Make the evaluation that was due after ``state`` when the run was stopped, if it was; return the state then."""
    if not is_unevaluated(recipe, parts, state):
        return state
    state = measure(recipe, parts, run, observer, state)
    if is_to_be_saved(recipe, parts, state):
        save(recipe, parts, run, observer, state)
    return state


def goes_on(recipe: Recipe, parts: "Parts", observer: Observer, state: TrainState) -> bool:
    """Return whether there is a step after ``state``; ``observer`` hears why not, if it is not the last."""
    if state.step >= parts.steps:
        return False
    if has_lost_patience(recipe, state):
        told = f"{state.stale} evaluations without a lower held-out loss (train.patience)"
        observer.note(f"stopped after step {state.step}: {told}")
        return False
    return True


@dataclass(frozen=True)
class Begun:
    """A step whose gradients are summed already, together with other runs'."""

    loss: Tensor
    seconds: float
    """That their passes took."""


def conclude(recipe: Recipe, parts: "Parts", run: RunFolder, observer: Observer, state: TrainState, limits: Limits) -> TrainState:
    """Make the evaluation and the checkpoint that are due after ``state``; return the state then. ``limits``: those before its step."""
    if is_due(recipe.train.eval_every, state.step, parts.steps):
        state = measure(recipe, parts, run, observer, state)
    # What was learned of the machine is kept at once: it decides how the next steps are cut, and so their bits.
    has_learned = parts.stepper.limits != limits
    if has_learned or is_to_be_saved(recipe, parts, state):
        save(recipe, parts, run, observer, state)
    return state


def announce(observer: Observer, name: str) -> None:
    """Say that a signal was heard: until the micro-batch ends nothing else would show it."""
    with suppress(QliteError):  # a full disk, which will be told where it matters
        after = "stopping after this micro-batch, with a checkpoint of the last whole step, if there is one"
        observer.note(f"{name}: {after}; Ctrl-C again stops at once")


def is_unevaluated(recipe: Recipe, parts: "Parts", state: TrainState) -> bool:
    """Return whether the evaluation that is due after ``state`` has not been made."""
    return 0 < state.step != state.measured and is_due(recipe.train.eval_every, state.step, parts.steps)


def has_lost_patience(recipe: Recipe, state: TrainState) -> bool:
    """Return whether the held-out loss has not fallen for train.patience evaluations."""
    return 0 < recipe.train.patience <= state.stale


def is_to_be_saved(recipe: Recipe, parts: "Parts", state: TrainState) -> bool:
    """Return whether ``state`` gets a checkpoint whatever happens next."""
    return has_lost_patience(recipe, state) or is_due(recipe.output.save_every, state.step, parts.steps)


def advance(
    recipe: Recipe, parts: "Parts", run: RunFolder, observer: Observer, state: TrainState, batches: list[Batch], begun: Begun | None = None
) -> TrainState:
    """Make the step after ``state``, or skip it where its loss or gradient is no number; return the state then."""
    plan, step, started = recipe.train, state.step + 1, time.perf_counter() - (begun.seconds if begun else 0.0)
    method, hooked = recipe.method, (parts.model, parts.optimizer, step, parts.steps)
    factor = recipe.schedule.factor(step, parts.steps) * method.lr_factor(step, parts.steps)
    lr = parts.optimizer.set_lr_factor(factor, method.part_factors(step, parts.steps))
    parts.stepper.before_update, seed = partial(method.before_step, *hooked), (plan.seed, step)
    try:
        with parts.meter.step():
            most_loss = divergence.most_loss(plan, state)
            result = parts.stepper.step(batches, parts.optimizer, plan.clip_norm, seed, most_loss, begun and begun.loss)
    except Diverged as fault:
        rows = divergence.rows_of(step, parts.batches, parts.data)
        state = replace(state, step=step, **vars(parts.stepper.limits))
        state, told = divergence.after_fault(plan, state, fault, rows, run)
        observer.note(told)
        method.after_step(*hooked)  # what is due after this step is not due again
        return state
    method.after_step(*hooked)
    seconds, epoch = time.perf_counter() - started, step / parts.batches.steps_per_epoch
    report = StepReport(**vars(result), step=step, steps=parts.steps, epoch=epoch, lr=lr, seconds=seconds, memory=parts.meter.read())
    observer.step(report)
    state = replace(state, step=step, tokens=state.tokens + report.tokens, **vars(parts.stepper.limits))
    return divergence.after_loss(plan, state, report.loss)


def save(recipe: Recipe, parts: "Parts", run: RunFolder, observer: Observer, state: TrainState) -> None:
    """Write a checkpoint of ``state``, if there is none yet."""
    suffix = UNEVALUATED if is_unevaluated(recipe, parts, state) else ""
    with refusals_told(recipe, observer):
        run.save(state, parts.model, parts.optimizer, recipe.output.keep, suffix)
        run.write_memory(parts.meter.compared())


@contextmanager
def refusals_told(recipe: Recipe, observer: Observer) -> Iterator[None]:
    """Let a disk refuse what is written inside, if output.on_full_disk is "continue"; ``observer`` hears of it."""
    try:
        yield
    except DiskError as error:
        if recipe.output.on_full_disk == "stop":
            raise
        observer.note(f'{error}. Going on without it (output.on_full_disk = "continue")')


def measure(recipe: Recipe, parts: "Parts", run: RunFolder, observer: Observer, state: TrainState) -> TrainState:
    """Evaluate on the held-out rows and let the model answer the recipe's samples; return the state with what was found."""
    if recipe.train.samples:
        with parts.meter.answering():
            observer.sampled(sample(parts.model, parts.data, recipe.train, state.step, observer))
    if not len(parts.data.test):
        return replace(state, measured=state.step)
    with parts.meter.evaluating():
        evaluation = evaluate(parts.stepper, parts.data, recipe.train, state.step, observer)
    observer.evaluated(evaluation)
    after = state.after(evaluation.loss)
    if recipe.output.adapter == "best" and after.best_step == state.step:
        with refusals_told(recipe, observer):
            run.save_best(after, parts.model)
            return after
        # Refused: what is on no disk cannot be the best.
        return replace(after, best_loss=state.best_loss, best_step=state.best_step)
    return after


Answered = dict[tuple[str, int, int], AnswerReport]
"""What was answered, by the data's keys, how many prompts and of how many tokens."""


def answer(recipe: Recipe, parts: "Parts", observer: Observer, step: int, known: Answered | None = None) -> None:
    """Let the model answer held-out prompts, if the recipe asks for it. ``known``: what models that answer alike have answered before."""
    plan, known = recipe.train, {} if known is None else known
    if not plan.exact_match_rows:
        return
    asked = (repr(recipe.data), plan.exact_match_rows, plan.answer_tokens)
    if asked not in known:
        with parts.meter.answering():
            known[asked] = compare_answers(parts.model, parts.data, plan, step, observer)
    observer.answered(known[asked])
