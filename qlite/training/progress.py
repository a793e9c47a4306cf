"""What a run has told its console so far, in bounded memory: open phases, the loss curve, the latest figures."""

import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from math import isfinite

from qlite.training.report import AnswerReport, EvalReport, StepReport
from qlite.units import MIB, format_bytes, format_seconds


@dataclass
class Phase:
    """One stretch of work before or between steps, and how far it is."""

    name: str
    total: int
    first_done: int
    is_first_run: bool
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    was_announced: bool = False
    announced_tenth: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def fraction(self) -> float:
        return min(1.0, self.done / self.total) if self.total > 0 else 0.0

    @property
    def tenth(self) -> int:
        return int(10 * self.fraction)

    @property
    def is_bytes(self) -> bool:
        # The Observer names no unit. Nobody counts 64 million rows or tensors here, and a model file is larger.
        return self.name.startswith(("download", "read and encode")) or max(self.total, self.done) >= 64 * MIB

    @property
    def amount(self) -> str:
        """How far it is: "3.91 GiB of 13.5 GiB, 75.2 MiB/s" or "120 of 400"."""
        amount = f"{self._show(self.done)} of {self._show(self.total)}" if self.total > 0 else self._show(self.done)
        return f"{amount}, {self.rate}" if self.is_bytes else amount

    @property
    def rate(self) -> str:
        """Bytes per second since the phase began, not counting what was there already."""
        return f"{format_bytes((self.done - self.first_done) / max(self.seconds, 0.1))}/s"

    @property
    def summary(self) -> str:
        """How it went: "13.5 GiB in 3m 05s"."""
        return f"{self._show(self.done)} in {short_seconds(self.seconds)}"

    @property
    def time(self) -> str:
        """The time left where it can be told, else the time taken."""
        gained = self.done - self.first_done
        if self.total <= 0 or gained <= 0:
            return short_seconds(self.seconds)
        return f"left {format_seconds(self.seconds * (self.total - self.done) / gained)}"

    def _show(self, number: int) -> str:
        return format_bytes(number) if self.is_bytes else f"{number:,}"


class LossHistory:
    """The losses as at most 1,024 points: when full, neighbours merge and each point means twice as many steps."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self._stride, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        if not isfinite(value):
            return
        self._sum += value
        self._count += 1
        if self._count == self._stride:
            self.points.append(self._sum / self._stride)
            self._sum, self._count = 0.0, 0
        if len(self.points) == 1024:
            # A new list, not the old one shortened: the refresh thread may be reading it.
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
            self._stride *= 2


class RunView:
    """Everything the screen shows, in bounded memory. Written by the training thread, read by the refresh thread."""

    def __init__(self, title: str):
        self.title = title
        self.version = 0
        self.outcome = ""
        self.phases: dict[str, Phase] = {}
        self.losses = LossHistory()
        self.evals: list[tuple[int, float]] = []
        self.first_eval: EvalReport | None = None
        self.last_eval: EvalReport | None = None
        self.first_answers: AnswerReport | None = None
        self.last_answers: AnswerReport | None = None
        self.first: StepReport | None = None
        self.last: StepReport | None = None
        self._names: set[str] = set()
        self._speeds: deque[float] = deque(maxlen=20)
        self._started = self._first_step_at = self._last_step_at = time.monotonic()
        self._ended: float | None = None

    @property
    def elapsed(self) -> float:
        return (self._ended or time.monotonic()) - self._started

    @property
    def tokens_per_second(self) -> float:
        """The median over the last 20 steps: one slow step does not shake it."""
        return statistics.median(list(self._speeds) or [0.0])

    @property
    def seconds_left(self) -> float | None:
        """Time the remaining steps take at the pace so far, evaluations included and the first step (warm-up) not."""
        if not self.last or self.last.step <= self.first.step:
            return None
        pace = (self._last_step_at - self._first_step_at) / (self.last.step - self.first.step)
        return max(0.0, pace * (self.last.steps - self.last.step))

    def phase(self, name: str, done: int, total: int) -> tuple[list[Phase], Phase]:
        """Return the phases that this report ends, and the phase it is about."""
        phase = self.phases.get(name)
        if phase is None or done < phase.done:
            phase = Phase(name, total, done, is_first_run=name not in self._names)
            self._names.add(name)
            ended = [other for other in self.phases.values() if other.total <= 0 and other.name != name]
        else:
            ended = []
        phase.done, phase.total = done, total
        if 0 < total <= done:
            ended.append(phase)
        self.phases = {key: value for key, value in {**self.phases, name: phase}.items() if value not in ended}
        self.version += 1
        return ended, phase

    def close_phases(self) -> list[Phase]:
        """Return the phases that never said they were finished, and forget them."""
        open_phases, self.phases = list(self.phases.values()), {}
        return open_phases

    def step(self, report: StepReport) -> list[Phase]:
        """Take one step in and return the phases it ends. This is all that a step pays for."""
        self._last_step_at = time.monotonic()
        if self.first is None:
            self.first, self._first_step_at = report, self._last_step_at
        self.last = report
        self.losses.add(report.loss)
        self._speeds.append(report.tokens / max(report.seconds, 1e-9))
        self.version += 1
        return self.close_phases() if self.phases else []

    def evaluated(self, report: EvalReport) -> None:
        self.first_eval = self.first_eval or report
        self.last_eval = report
        if isfinite(report.loss):
            self.evals = [*(self.evals if len(self.evals) < 256 else self.evals[::2]), (report.step, report.loss)]
        self.version += 1

    def freeze(self, outcome: str) -> None:
        self._ended, self.outcome = time.monotonic(), outcome
        self.version += 1


def short_seconds(seconds: float) -> str:
    """Return a duration, with a decimal below ten seconds."""
    return f"{seconds:.1f}s" if seconds < 10 else format_seconds(seconds)


def format_perplexity(value: float) -> str:
    """Return a perplexity with two decimals, or with an exponent from ten thousand on."""
    return f"{value:,.2f}" if value < 1e4 else f"{value:.2e}"
