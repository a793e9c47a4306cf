"""Errors a user can act on: each says what is wrong, where, the value seen, and the fix. Printed without a traceback."""

from collections.abc import Sequence

SHOWN_CHARACTERS = 80
MOST_PROBLEMS = 20
"""Of a recipe, in one message."""


def shown(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Return ``text`` as a message can hold it: on one line, printable, not longer than ``limit``."""
    text = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return printable(text).replace("\n", "\\n")


def some_of(problems: Sequence[str], most: int) -> str:
    """Return the first ``most`` of ``problems`` and how many more there are."""
    return f"{'; '.join(problems[:most])}{and_more(len(problems) - most)}"


def and_more(count: int) -> str:
    """Return the words for ``count`` others that are not shown; nothing where there are none."""
    return f" (and {count} more)" if count > 0 else ""


def printable(text: str) -> str:
    """Return ``text`` with all but its line breaks escaped that a terminal would not show, or would obey."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def install_line(*extras: str) -> str:
    """Return what is typed in qlite's own folder, for it is on no package index, to install its ``extras``."""
    return f"pip install -e '.[{','.join(extras)}]'"


class Brief(BaseException):
    """What a notebook shows as on a terminal: its message, without the way it took through qlite."""

    def _render_traceback_(self) -> list[str]:
        """Return what IPython prints instead of a traceback (``InteractiveShell.showtraceback``)."""
        return [f"{type(self).__name__}: {self}", *getattr(self, "__notes__", ())]


class QliteError(Brief, Exception):
    """Base of every error that a verb prints as its message alone; ``exit_code`` is the process's exit status."""

    exit_code = 2

    def __init__(self, message: str = ""):
        # Here, for all: names of files and tensors, keys, rows and templates are a stranger's, and end up in messages.
        super().__init__(printable(message))


class RecipeError(QliteError):
    """A recipe's keys are unknown, missing, of the wrong type, out of range or at odds: every problem at once."""

    def __init__(self, problems: str | Sequence[str], path: str = ""):
        self.problems = [printable(problem) for problem in ([problems] if isinstance(problems, str) else problems)]
        prefix = f"{path}: " if path else ""
        told = [prefix + problem for problem in self.problems[:MOST_PROBLEMS]]
        more = len(self.problems) - len(told)
        super().__init__("\n".join([*told, f"{prefix}and {more} more"] if more else told))


class ModelError(QliteError):
    """The base model's files are missing, malformed, of a kind that is not read, or not what the recipe promised."""


class DataError(QliteError):
    """A row, a data file or a chat template cannot be used; the message names file and line."""


class AdapterError(QliteError):
    """An adapter's files do not fit each other or the base they are put on."""


class RunError(QliteError):
    """A run folder is missing, unfinished, or belongs to another recipe."""


class NotMergeable(QliteError):
    """The method changes the network in a way that no single weight matrix can express."""


class ExportError(QliteError):
    """What was trained cannot be written in the form that was asked for without harm."""

    exit_code = 4


class MachineError(QliteError):
    """The machine lacks what the work needs: disk, memory, a device, a permission."""

    exit_code = 3


class DiskError(MachineError):
    """A disk does not take what is to be written: it is full, over a quota, read-only or failing. What was written before is whole."""


class OutOfMemory(MachineError):
    """Work that cannot be made any smaller does not fit into memory: ``rows`` lines of ``tokens`` tokens each."""

    def __init__(self, message: str, rows: int, tokens: int):
        self.rows, self.tokens = rows, tokens
        super().__init__(message)


class Diverged(QliteError):
    """Training produced a loss or a gradient that is not finite; nothing of it was stepped or saved."""

    exit_code = 4
