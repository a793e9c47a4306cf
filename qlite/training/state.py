"""Where a run stands, in numbers: with the tensors of its checkpoint all that it takes to go on."""

from dataclasses import dataclass, replace
from math import isfinite


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. Order of rows and dropout are functions of the seed and the step, so nothing else is needed."""

    step: int = 0
    tokens: int = 0
    """Tokens read so far, padding not counted."""
    best_loss: float | None = None
    """Lowest held-out loss so far, in nats."""
    best_step: int = 0
    stale: int = 0
    """Evaluations since then."""
    measured: int = 0
    """The step of the last evaluation that is in this state: a run that was stopped before or in one that is due begins with it."""
    recent: tuple[float, ...] = ()
    """Losses of the last steps, by which train.spike_factor knows a jump."""
    skipped: int = 0
    """Steps up to this one, in a row, that were not made because they were not finite, or a jump."""
    loss_chunk: int | None = None
    """Like ``most_tokens``, a limit of training.limits, lowered where memory ran out: what is cut elsewhere sums in another order."""
    most_tokens: int | None = None

    def after(self, loss: float) -> "TrainState":
        """Return the state after an evaluation of held-out ``loss`` at this step."""
        measured = replace(self, measured=self.step)
        if isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            return replace(measured, best_loss=loss, best_step=self.step, stale=0)
        return replace(measured, stale=self.stale + 1)
