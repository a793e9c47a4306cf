"""Malformed inputs, class by class: each is refused in plain words that name it, in a moment, and nothing on the disk changes.

Every class is a module with ``cases()``; test_total.py adds them up.
"""

import contextlib
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qlite.errors import QliteError
from qlite.units import GIB

SECONDS = 5.0
"""In which a malformed input is refused."""
MOST_BYTES = 1 * GIB
"""Of memory, which all cases of a class may take together."""


@dataclass(frozen=True)
class Case:
    """One malformed input."""

    name: str
    give: Callable[[Path], Callable[[], object]]
    """Puts the input into an empty folder, and returns what has qlite read it."""
    words: tuple[str, ...] = ()
    """What the message says."""
    pattern: str = ""
    """A regular expression of what it says."""


def count_refused(what: str, cases: list[Case], folder: Path, record: Callable[[str, object], None]) -> None:
    """Have qlite read all ``cases``, tell how many are refused, and fail with all that are not."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), sorted({name for name in names if names.count(name) > 1})
    before = peak_bytes()
    faults = []
    for number, case in enumerate(cases):
        place = folder / str(number)
        place.mkdir()
        faults += [f"{case.name}: {fault}" for fault in [fault_of(case, place)] if fault]
    taken = peak_bytes() - before
    record("figure", f"malformed {what}: refused {len(cases) - len(faults)}/{len(cases)}")
    assert not faults, "\n" + "\n".join(faults)
    assert taken < MOST_BYTES, f"took {taken / GIB:.2f} GiB"


def fault_of(case: Case, folder: Path) -> str:
    """Return in which way ``case`` is not refused as it should be, or "" where it is."""
    read = case.give(folder)
    before = tree(folder)
    begun = time.perf_counter()
    try:
        with at_most(SECONDS):
            found = read()
    except QliteError as error:
        message, code = str(error), error.exit_code
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"raises {type(error).__name__}: {str(error)[:300]}"
    else:
        return f"is accepted: {found!r:.200}"
    seconds = time.perf_counter() - begun
    checks = {
        f"ends with code {code}": code == 2,
        f"takes {seconds:.1f} s": seconds < SECONDS,
        "says nothing of it": bool(message.strip()),
        "shows a traceback": "Traceback" not in message,
        "has raw control characters": all(line.isprintable() for line in message.split("\n")),
        f"has {len(message)} characters": len(message) < 10_000,
        "changes the disk": tree(folder) == before,
        f"does not say what it should ({case.words or case.pattern})": says(message, case),
    }
    wrong = [text for text, is_right in checks.items() if not is_right]
    return f"{'; '.join(wrong)}: {message[:500]!r}" if wrong else ""


def says(message: str, case: Case) -> bool:
    """Return whether ``message`` is the one that ``case`` expects."""
    return all(word in message for word in case.words) and re.search(case.pattern, message) is not None


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return all that lies in and beside ``folder``, which an input may name, with what changes when it is written to."""
    status = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (found.st_mode, found.st_size, found.st_mtime_ns) for path, found in status.items()}


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Interrupt what waits for ever (the opening of a pipe) with TimeoutError, where the system can."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise TimeoutError(f"not refused within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 2 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_bytes() -> int:
    """Return the most memory that this process has had so far; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def silent(phase: str, done: int, total: int) -> None:
    """A progress that nobody watches."""
