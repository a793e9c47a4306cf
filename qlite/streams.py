"""Text on its way to a terminal: strangers' texts must not steer it, and output that nobody can take ends no run."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import TextIO


class ForgivingStream:
    """A text stream whose failures nobody sees: after a first one it is silent."""

    def __init__(self, stream: TextIO | None):
        self._stream = io.StringIO() if stream is None else stream  # pythonw.exe has none
        self._is_silent = stream is None

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self._is_silent:
            with self._dropping_failures():
                self._write(text)
        return len(text)

    def flush(self) -> None:
        if not self._is_silent:
            with self._dropping_failures():
                self._stream.flush()

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            self._stream.write(text.encode(self._stream.encoding, "replace").decode(self._stream.encoding))

    @contextlib.contextmanager
    def _dropping_failures(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            pass  # A terminal left non-blocking by another program: this write is lost, the next may work.
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        self._is_silent = True
        if self._stream in (sys.__stdout__, sys.__stderr__):
            # What is still in its buffer would fail again when Python exits, and change the exit status (see the
            # note on SIGPIPE in Python's signal module).
            with contextlib.suppress(OSError, ValueError):
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, self._stream.fileno())
                os.close(devnull)


@contextlib.contextmanager
def forgiving_output() -> Iterator[None]:
    """Let what is printed be dropped where it cannot be written."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a character that the terminal's encoding lacks is no reason to stop
    sys.stdout, sys.stderr = map(ForgivingStream, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def clean(text: str, limit: int = 200) -> str:
    """Return ``text`` as one line of at most ``limit`` characters that cannot steer a terminal.

    Escape sequences, C0/C1 controls, bidirectional overrides and lone surrogates go; line ends show as "\\n".
    """
    # Cut first: a regular expression over megabytes would hold up the step that reports them.
    shown = re.sub(r"\r?\n", r"\\n", text[: 2 * limit])
    shown = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?", "", shown).replace("\t", " ")
    shown = re.sub("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", "", shown)
    return shown if len(shown) <= limit and len(text) <= 2 * limit else shown[: limit - 1] + "…"


def clean_lines(text: str) -> str:
    """Return ``text`` with its line ends and tabs, and nothing that can steer a terminal."""
    return "\n".join("\t".join(clean(part, limit=len(part) + 1) for part in line.split("\t")) for line in text.split("\n"))
