"""Signals that ask a process to stop: Ctrl-C, a closing terminal, a shutdown. Answered at once or, while a run takes steps, at the
next micro-batch, so that all that was learned can be written first; a second Ctrl-C is always answered at once.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from qlite.errors import Brief


def signals() -> list[int]:
    """Return those that this system has: Windows knows no SIGHUP, and no other a SIGBREAK."""
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


class Stopped(Brief):
    """The process was asked to stop by the signal ``number``."""

    def __init__(self, number: int):
        self.number = number
        self.name = signal.Signals(number).name
        super().__init__(self.name)

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells have it."""
        return 128 + self.number


class Interrupted(Stopped, KeyboardInterrupt):
    """By Ctrl-C: a chat that is answering takes it as an end of the answer, not of itself."""


class StoppedAtOnce(Interrupted):
    """By a second Ctrl-C: what was under way is given up where it stood."""


class Stop:
    """Whether this process was asked to stop, and by which signal; ``tell`` hears of it at once."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.number: int | None = None
        self._tell = tell

    def check(self) -> None:
        """Raise Stopped if it was."""
        if self.number is not None:
            raise _stopped(self.number)

    def _hear(self, number: int, _frame: object) -> None:
        if self.number is None:
            self.number = number
            # In a thread of its own: what this one was writing when the signal came it may not begin to write again.
            with suppress(RuntimeError, MemoryError):  # a machine that gives no more threads
                threading.Thread(target=self._tell, args=(signal.Signals(number).name,), daemon=True).start()
        elif number == signal.SIGINT:  # a closing terminal sends SIGHUP twice, and a shutdown several kinds
            raise StoppedAtOnce(number)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Raise Stopped wherever the process is when a signal comes, so that what was begun is cleaned up."""

    def stop(number: int, _frame: object) -> None:
        for other in signals():
            if other != signal.SIGINT and signal.getsignal(other) is stop:
                signal.signal(other, signal.SIG_IGN)  # what follows is no reason to break off the cleaning up
        raise _stopped(number)

    with _handled_by(stop):
        yield


@contextmanager
def stopping_softly(tell: Callable[[str], None] = lambda _: None) -> Iterator[Stop]:
    """Give what hears of the first signal; a Ctrl-C after it raises StoppedAtOnce wherever the process is.

    ``tell`` is given the first signal's name at once, in a thread of its own.
    """
    stop = Stop(tell)
    with _handled_by(stop._hear):
        yield stop


def _stopped(number: int) -> Stopped:
    return (Interrupted if number == signal.SIGINT else Stopped)(number)


@contextmanager
def _handled_by(handler: Callable) -> Iterator[None]:
    # Python hands signals to the main thread alone; and what was ignored from outside (nohup) stays so.
    mine = signals() if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.getsignal(number) for number in mine}
    changed = [number for number, old in before.items() if old is not signal.SIG_IGN]
    for number in changed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number] if before[number] is not None else signal.SIG_DFL)
