"""Steps that are not made: a loss or a gradient that is no number, or a loss that jumps, is never learned from."""

from dataclasses import replace
from statistics import median

from qlite.data.batches import TokenBatches
from qlite.data.dataset import DataSet
from qlite.errors import Diverged
from qlite.recipe.schema import Train
from qlite.training.run_folder import RunFolder
from qlite.training.state import TrainState

REMEMBERED = 50
"""Losses whose median a loss is held against."""
ENOUGH = 10
"""Losses before any is."""
NAMED = 8
"""Rows that a message names."""


def most_loss(train: Train, state: TrainState) -> float:
    """Return the loss, in nats, beyond which the step after ``state`` is a jump: train.spike_factor times the median of the last ones."""
    if not train.spike_factor or len(state.recent) < ENOUGH:
        return float("inf")
    return train.spike_factor * median(state.recent)


def after_loss(train: Train, state: TrainState, loss: float) -> TrainState:
    """Return ``state`` after a step of ``loss`` that was made."""
    recent = (*state.recent, loss)[-REMEMBERED:] if train.spike_factor else ()
    return replace(state, recent=recent, skipped=0)


def after_fault(train: Train, state: TrainState, fault: Diverged, rows: list[str], run: RunFolder) -> tuple[TrainState, str]:
    """Return the state after the step ``state.step``, which was not made because of ``fault``, and what to tell.

    Raises:
        Diverged: more than train.max_skipped steps in a row were not made; it names the last good checkpoint and the step's rows.
    """
    state = replace(state, skipped=state.skipped + 1)
    named = f"{', '.join(rows[:NAMED])}{f' and {len(rows) - NAMED} more' if len(rows) > NAMED else ''}"
    if state.skipped > train.max_skipped:
        first, newest = state.step - state.skipped + 1, run.newest
        steps = f"step {first}" if first == state.step else f"steps {first} to {state.step}"
        raise Diverged(
            f"{steps}: {fault}, {state.skipped} in a row (train.max_skipped = {train.max_skipped}). Nothing of them was stepped or saved; "
            f"the last good checkpoint is {newest or 'not there: none was written yet'}. Rows of step {state.step}: {named}. "
            "Lower optimizer.lr or raise schedule.warmup_steps, with --fresh or another output.dir; if it is the same rows again and "
            "again, look at them; train.max_skipped may be raised as it is"
        )
    return state, f"step {state.step} is skipped, {state.skipped} of at most {train.max_skipped} in a row: {fault}. Its rows: {named}"


def require_any_step(state: TrainState) -> None:
    """Raise Diverged if a run is at its end and none of its steps could be made."""
    if state.step and state.skipped == state.step:
        raise Diverged(
            f"none of {state.step} steps could be made, so nothing was trained. Lower optimizer.lr, or look at the base and the rows"
        )


def rows_of(step: int, batches: TokenBatches, data: DataSet) -> list[str]:
    """Return where the rows of ``step`` stand: "train.jsonl line 17"."""
    return [data.train.where(row) for micro_batch in batches.plan(step) for line in micro_batch for row in line]
