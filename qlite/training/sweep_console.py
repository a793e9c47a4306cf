"""The terminal of a sweep: plain lines, a step of all runs in one, and what concerns one run under its name."""

import sys
import time
from typing import TextIO

from qlite.streams import clean
from qlite.training.console import PlainConsole
from qlite.training.progress import format_perplexity, short_seconds
from qlite.training.report import AnswerReport, EvalReport, Observer, SampleReport, StepReport
from qlite.units import format_bytes, format_seconds

MOST_STEPS_SHOWN = 40


class SweepLines:
    """Writes a sweep as lines. To be used as ``with SweepLines(...) as console``."""

    def __init__(self, title: str, names: list[str], stream: TextIO | None = None):
        self._lines = PlainConsole(title, stream or sys.stdout)
        self._width = max(map(len, names))
        self._said: set[str] = set()
        self._reports: dict[str, StepReport] = {}
        self._began: tuple[float, int] | None = None
        """When the first step began, and its number."""

    def __enter__(self) -> "SweepLines":
        self._lines.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *others: object) -> None:
        self._print_step()
        self._lines.__exit__(kind, *others)

    def of(self, name: str) -> "_OneRun":
        """Return the observer of the run called ``name``."""
        return _OneRun(self, name)

    def note(self, message: str) -> None:
        """Write it, unless another run has said the same: most of it is about the machine and the base."""
        if message not in self._said:
            self._said.add(message)
            self._lines.note(message)

    def own_note(self, name: str, message: str) -> None:
        """Write what concerns one run."""
        if message not in self._said:
            self._lines.note(f"{name:<{self._width}}  {message}")

    def phase(self, name: str, done: int, total: int) -> None:
        """A phase of all runs."""
        self._lines.phase(name, done, total)

    def step(self, name: str, report: StepReport) -> None:
        """Take a run's step; a line is written when the next step begins."""
        if any(report.step != each.step for each in self._reports.values()):
            self._print_step()
        self._reports[name] = report
        self._began = self._began or (time.monotonic() - report.seconds, report.step)

    def _print_step(self) -> None:
        reports, self._reports = self._reports, {}
        if not reports:
            return
        first, steps = next(iter(reports.values())), max(report.steps for report in reports.values())
        began, number = self._began
        if first.step not in (number, steps) and first.step % -(-steps // MOST_STEPS_SHOWN):
            return
        seconds = max(report.seconds for report in reports.values())
        tokens, passed = sum(report.tokens for report in reports.values()), time.monotonic() - began
        left = format_seconds(passed / (first.step - number + 1) * (steps - first.step))
        losses = "  ".join(f"{name} {report.loss:.4f}" for name, report in reports.items())
        speed = f"{tokens / max(seconds, 1e-9):,.0f} tok/s  memory {format_bytes(first.memory.used)}  left {left}"
        self._lines.note(f"step {first.step}/{steps}  loss  {losses}  {speed}")


class _OneRun(Observer):
    def __init__(self, all_runs: SweepLines, name: str):
        self._all, self._name = all_runs, name

    def note(self, message: str) -> None:
        self._all.own_note(self._name, message)

    def phase(self, name: str, done: int, total: int) -> None:
        self._all.phase(f"{self._name}: {name}", done, total)

    def step(self, report: StepReport) -> None:
        self._all.step(self._name, report)

    def evaluated(self, report: EvalReport) -> None:
        found = f"eval loss {report.loss:.4f}  perplexity {format_perplexity(report.perplexity)}"
        self.note(f"step {report.step}  {found}  ({report.rows:,} rows in {short_seconds(report.seconds)})")

    def answered(self, report: AnswerReport) -> None:
        self.note(f"step {report.step}  answers {report.exact}/{report.rows} exact")

    def sampled(self, report: SampleReport) -> None:
        for prompt, answer in report.samples:
            self.note(f"step {report.step}  {clean(prompt, 120)}  ->  {clean(answer, 240)}")
