"""The screen of what Python calls: in a notebook one output of the cell, drawn over and over, and else as on the command line.

rich's own live display needs ipywidgets in a notebook, and is not kept when that is saved. An output with a name (IPython's
``display_id``) is replaced by every frontend, Jupyter's, Colab's and VS Code's, and a saved notebook holds its last state alone.
"""

import threading
import time
from collections import deque
from contextlib import suppress
from typing import TextIO

from rich.console import Console, Group
from rich.text import Text

from qlite.streams import clean
from qlite.training.console import LiveConsole, RunConsole, open_console
from qlite.training.panel import Frame
from qlite.training.progress import RunView
from qlite.training.report import AnswerReport, EvalReport, Observer, SampleReport, StepReport
from qlite.training.shown import as_bundle

MOST_LINES = 200
"""Notes and finished phases that are kept above the panel; the run's folder has all of them."""
LEAST_SECONDS = 1.0
"""Between two drawings: each goes to the browser whole."""


def console_for(title: str, is_quiet: bool = False, stream: TextIO | None = None) -> RunConsole:
    """Return the console of what Python calls: none at all, one output of a notebook's cell, or that of the command line."""
    if is_quiet:
        return SilentConsole()
    return NotebookConsole(title) if is_notebook() else open_console(title, stream)


def is_notebook() -> bool:
    """Return whether this is the kernel of a notebook: Jupyter's, Colab's or another of IPython's."""
    return Console().is_jupyter


class SilentConsole(Observer):
    """Shows nothing."""

    def __enter__(self) -> "SilentConsole":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was opened."""


class NotebookConsole(LiveConsole):
    """The panel of the terminal's live screen, and the lines above it, as one output of a cell."""

    def __init__(self, title: str):
        self._run = RunView(clean(title))
        self._screen = Cell(self._run)

    def phase(self, name: str, done: int, total: int) -> None:
        super().phase(name, done, total)
        self._screen.refresh()

    def step(self, report: StepReport) -> None:
        super().step(report)
        self._screen.refresh()

    def evaluated(self, report: EvalReport) -> None:
        super().evaluated(report)
        self._screen.refresh()

    def answered(self, report: AnswerReport) -> None:
        super().answered(report)
        self._screen.refresh()

    def sampled(self, report: SampleReport) -> None:
        super().sampled(report)
        self._screen.refresh()


class Cell:
    """An output of a notebook's cell. It is drawn by whoever reports: what a thread of ours sent would not belong to the cell."""

    def __init__(self, run: RunView):
        self._run, self._lines = run, deque(maxlen=MOST_LINES)
        self._lock, self._due, self._handle = threading.Lock(), 0.0, None

    def start(self, refresh: bool) -> None:
        """Put the output into the cell that runs now."""
        from IPython.display import display  # there is one only where there is a notebook

        self._handle = display(self._bundle(), raw=True, display_id=True)

    def print(self, line: Text) -> None:
        """Add ``line`` above the panel."""
        self._lines.append(line)
        self.refresh()

    def refresh(self) -> None:
        """Draw anew, if that was not done just now."""
        if time.monotonic() >= self._due:
            self._draw()

    def stop(self) -> None:
        """Draw what stays."""
        self._draw()

    def _draw(self) -> None:
        with self._lock:
            began = time.thread_time()
            with suppress(Exception):  # a flaw in the drawing, or in a notebook, must not end hours of training
                self._handle.update(self._bundle(), raw=True)
            # At most half a percent of one core, as on a terminal.
            self._due = time.monotonic() + max(LEAST_SECONDS, 200 * (time.thread_time() - began))

    def _bundle(self) -> dict[str, str]:
        is_over = bool(self._run.outcome) and self._run.last is None  # and took no step: there is nothing to draw
        end = Text(f"{self._run.title}  {self._run.outcome}", "dim") if is_over else Frame(self._run)
        return as_bundle(Group(*self._lines, end))
