"""What a tool that keeps the figures of runs is told of one, and what it must be able to do with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qlite.files import write_text

EVERYTHING = 2**62
"""A step later than any: what a tool knows that has all it was ever told."""
PATIENCE_SECONDS = 30
"""Longest that a finished run waits for a tool to take its last figures."""


@dataclass(frozen=True)
class LoggedRun:
    """A run as a tool shows it. No folder of this machine is named in anything but ``folder``."""

    name: str
    folder: Path
    """Where a tool may keep files of its own; it goes when the run is discarded."""
    config: dict[str, str | int | float | bool]
    """The recipe's keys by full name."""
    recipe: str
    """The recipe as TOML."""
    step: int
    """The step that the run goes on after; 0: it begins."""
    notes: tuple[tuple[int, str], ...]
    """What the user was told before, each after which step."""

    def kept(self, tool: str) -> str | None:
        """Return what ``tool`` calls this run, if it was begun there before."""
        path = self._identity(tool)
        return path.read_text(encoding="utf-8").strip() or None if path.is_file() else None

    def keep(self, tool: str, identity: str) -> None:
        """Remember what ``tool`` calls this run, so that the run goes on there."""
        write_text(self._identity(tool), identity + "\n")

    def _identity(self, tool: str) -> Path:
        return self.folder / f"{tool}.txt"


class Logger(Protocol):
    """One tool. Made where the run is, then used by one thread of its own; whatever it raises switches it off and ends nothing."""

    def begin(self, run: LoggedRun) -> int:
        """Begin or go on with ``run``; return the last step of which the tool has the figures, or EVERYTHING it was told."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Add points to curves."""

    def rows(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table of texts."""

    def note(self, step: int, text: str) -> None:
        """Show what the user was told."""

    def flush(self) -> None:
        """Let go of what is held back, if anything is; called whenever nothing more is waiting."""

    def end(self, is_finished: bool) -> None:
        """No more will come: the run is finished, or it was stopped and may go on later."""

    def leave(self) -> None:
        """See to it that what the tool has not taken keeps the process from nothing, if it could; called where it failed or is late."""


def literal(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown in which every text is shown letter by letter, whatever is in it."""
    parts = [f"**{column}**\n\n{_indented(text)}" for row in rows for column, text in zip(columns, row, strict=True)]
    return "\n\n".join(parts)


def _indented(text: str) -> str:
    """Return ``text`` as a code block: in one that is indented, unlike a fenced one, no text can end it."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
