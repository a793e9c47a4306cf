"""The terminal screen of a training run: a live panel on a real terminal, plain lines everywhere else.

Nothing here may slow training down or end it: ``step`` only appends to a bounded history, drawing happens in rich's
refresh thread, text from outside is stripped of control characters, and output that cannot be written is dropped.
"""

import os
import sys
import time
from collections.abc import Iterator
from typing import Protocol, TextIO

from rich.console import Console
from rich.text import Text

from qlite.stopping import Stopped
from qlite.streams import ForgivingStream, clean
from qlite.training.gauges import tensor_line
from qlite.training.panel import Screen
from qlite.training.progress import Phase, RunView, format_perplexity, short_seconds
from qlite.training.report import AnswerReport, EvalReport, Observer, SampleReport, StepReport
from qlite.units import format_bytes, format_seconds


class RunConsole(Observer, Protocol):
    """Where a run is shown, to be used as ``with console as observer``."""

    def __enter__(self) -> "RunConsole": ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...


def open_console(title: str, stream: TextIO | None = None) -> "LiveConsole | PlainConsole":
    """Return the console of a run, to be used as ``with open_console(title) as console``; both kinds are Observers.

    The live screen needs a terminal that can move its cursor and show Unicode; pipes, files and TERM=dumb get lines.
    """
    stream = stream or sys.stdout
    if _can_show_live_screen(stream):
        # Libraries print through this console while it is live: their text is text, not markup, emoji codes or syntax.
        return LiveConsole(title, Console(file=stream, force_terminal=True, markup=False, emoji=False, highlight=False))
    return PlainConsole(title, stream)


class PlainConsole:
    """Writes a run as lines: phases, at most about 40 steps, every evaluation, every note; once, the tensors by term."""

    def __init__(self, title: str, stream: TextIO):
        self._out = ForgivingStream(stream)
        self._run = RunView(clean(title))
        self._spoken = 0.0
        self._printed_step = 0
        self._has_told_terms = False

    def __enter__(self) -> "PlainConsole":
        self._print(self._run.title)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for phase in self._run.close_phases():
            self._print(f"{phase.name}: stopped at {phase.amount}")
        last = self._run.last
        if last and self._printed_step != last.step:
            self._print(_step_line(self._run))
        if last:
            self._print(f"{_outcome(kind, self._run)} after {format_seconds(self._run.elapsed)}")

    def note(self, message: str) -> None:
        for line in _note_lines(message):
            self._print(line)

    def phase(self, name: str, done: int, total: int) -> None:
        """A phase's start and end get a line the first time it runs; later runs speak through their own report."""
        finished, phase = self._run.phase(clean(name), done, total)
        now = time.monotonic()
        if phase.is_first_run and not phase.was_announced:
            phase.was_announced = True
            self._spoken = now
            self._print(f"{phase.name} ...")
        self._print_ends(finished)
        if not finished and now - self._spoken > 10 and phase.tenth > phase.announced_tenth:
            phase.announced_tenth, self._spoken = phase.tenth, now
            self._print(f"{phase.name}: {phase.amount}")

    def step(self, report: StepReport) -> None:
        is_first = self._run.last is None
        self._print_ends(self._run.step(report))
        if is_first or report.step == report.steps or report.step % -(-report.steps // 40) == 0:
            self._printed_step = report.step
            self._print(_step_line(self._run))
        if report.memory.terms and not self._has_told_terms:
            self._has_told_terms = True
            self._print(f"memory  {tensor_line(report.memory)}")

    def evaluated(self, report: EvalReport) -> None:
        self._run.evaluated(report)
        self._print(_eval_line(report))

    def answered(self, report: AnswerReport) -> None:
        for label, line in _answer_lines(self._run, report):
            self._print(f"{label}{line}")

    def sampled(self, report: SampleReport) -> None:
        for label, line in _sample_lines(report):
            self._print(f"{label}{line}")

    def _print_ends(self, phases: list[Phase]) -> None:
        for phase in phases:
            if phase.is_first_run:
                self._print(f"{phase.name}: {phase.summary}")

    def _print(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()


class LiveConsole:
    """Shows a run as one panel that redraws itself; notes and finished phases scroll by above it."""

    def __init__(self, title: str, console: Console):
        console.file = ForgivingStream(console.file)
        self._run = RunView(clean(title))
        self._screen = Screen(self._run, console)

    def __enter__(self) -> "LiveConsole":
        self._screen.start(refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._run.close_phases()
        self._run.freeze(_outcome(kind, self._run))
        self._screen.stop()

    def note(self, message: str) -> None:
        for line in _note_lines(message):
            self._screen.print(Text(line))

    def phase(self, name: str, done: int, total: int) -> None:
        """A bar while it runs; when it ends, the first time, one line above the panel."""
        self._print_ends(self._run.phase(clean(name), done, total)[0])

    def step(self, report: StepReport) -> None:
        self._print_ends(self._run.step(report))

    def evaluated(self, report: EvalReport) -> None:
        self._run.evaluated(report)

    def answered(self, report: AnswerReport) -> None:
        for label, line in _answer_lines(self._run, report):
            self._screen.print(Text.assemble((label, "dim"), line))

    def sampled(self, report: SampleReport) -> None:
        for label, line in _sample_lines(report):
            self._screen.print(Text.assemble((label, "dim"), line))

    def _print_ends(self, phases: list[Phase]) -> None:
        for phase in phases:
            if phase.is_first_run:
                self._screen.print(Text.assemble(("✓ ", "green"), phase.name, (f"  {phase.summary}", "dim")))


# Lines that both consoles write, and how they are written.


def _can_show_live_screen(stream: TextIO) -> bool:
    try:
        is_terminal = stream.isatty()
    except (AttributeError, ValueError):  # no stream at all, or a closed one
        return False
    encoding = getattr(stream, "encoding", None) or ""
    # A notebook's "!command" gets a terminal that no cursor moves on; the variable is what jupyter_client gives every kernel, and Colab's.
    is_terminal = is_terminal and "JPY_PARENT_PID" not in os.environ
    return is_terminal and os.environ.get("TERM") not in ("dumb", "unknown") and encoding.lower().startswith("utf")


def _outcome(kind: type[BaseException] | None, run: RunView) -> str:
    if kind is None:
        return "finished"
    at = f" at step {run.last.step}" if run.last else ""
    return f"interrupted{at}" if issubclass(kind, Stopped | KeyboardInterrupt) else f"stopped{at} by {kind.__name__}"


def _step_line(run: RunView) -> str:
    report = run.last
    left = f"  left {format_seconds(run.seconds_left)}" if run.seconds_left is not None else ""
    return (
        f"step {report.step}/{report.steps}  epoch {report.epoch:.2f}  loss {report.loss:.4f}  lr {report.lr:.2e}  "
        f"grad {report.grad_norm:.3g}  {run.tokens_per_second:,.0f} tok/s  "
        f"memory {format_bytes(report.memory.used)}{left}"
    )


def _eval_line(report: EvalReport) -> str:
    return (
        f"step {report.step}  eval loss {report.loss:.4f}  perplexity {format_perplexity(report.perplexity)}  "
        f"({report.rows:,} rows in {short_seconds(report.seconds)})"
    )


def _note_lines(message: str) -> list[str]:
    lines = [clean(line, 1000) for line in message.splitlines()[:20]]
    return [*lines, "…"] if message.count("\n") > 20 else lines


def _answer_lines(run: RunView, report: AnswerReport) -> Iterator[tuple[str, str]]:
    """Yield (label, text): the count of exact answers, then two samples with the answer before training and now."""
    before = run.first_answers
    run.first_answers, run.last_answers = before or report, report
    run.version += 1
    was = f", before {before.exact}/{before.rows}" if before else ""
    yield "answers ", f"at step {report.step}: {report.exact}/{report.rows} exact{was}"
    for index, (prompt, expected, answer) in enumerate(report.samples[:2]):
        yield "  prompt    ", clean(prompt, 300)
        yield "  expected  ", clean(expected, 300)
        if before and index < len(before.samples):
            yield "  before    ", clean(before.samples[index][2], 300)
        yield ("  now       " if before else "  answer    "), clean(answer, 300)


def _sample_lines(report: SampleReport) -> Iterator[tuple[str, str]]:
    """Yield (label, text) of each sample."""
    yield "samples ", f"at step {report.step}"
    for prompt, answer in report.samples:
        yield "  prompt    ", clean(prompt, 300)
        yield "  answer    ", clean(answer, 600)
