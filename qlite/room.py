"""What a disk has room for, and what the system says of it, in words."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from qlite.errors import DiskError, MachineError
from qlite.units import format_bytes


def free_disk(path: Path) -> int:
    """Return the bytes that can still be written where ``path`` is, or will be."""
    there = next(place for place in (path, *path.parents) if place.exists())
    return shutil.disk_usage(there).free


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise DiskError unless ``needed_bytes`` can be written to ``folder``, which need not be there yet."""
    free = free_disk(folder)
    if needed_bytes > free:
        raise DiskError(
            f'"{folder}": {what} would need {format_bytes(needed_bytes)} there, and {format_bytes(free)} are free. Make room, or '
            "choose a folder on another disk"
        )


@contextmanager
def explained(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn what the system says of a write into words; ``needed_bytes``: its size."""
    try:
        yield
    except SafetensorError as error:  # the library has its own words: "I/O error: No space left on device (os error 28)"
        code = re.search(r"os error (\d+)", str(error))
        raise _refused(path, int(code[1]) if code else None, str(error), needed_bytes) from error
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error.filename, str) and not _is_about(Path(error.filename), path):
            raise MachineError(f'cannot read "{error.filename}", for "{path}": {reason}') from error
        raise _refused(path, error.errno, reason, needed_bytes) from error


def _is_about(named: Path, path: Path) -> bool:
    """Return whether an error of the file ``named`` is one of writing ``path``: it lies beside, in or above it."""
    named, path = named.absolute(), path.absolute()
    return path.parent in named.parents or named in path.parents


def _refused(path: Path, code: int | None, reason: str, needed_bytes: int | None) -> MachineError:
    message = f'cannot write "{path}": {reason}'
    if code not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
        return MachineError(message)
    needed = "" if needed_bytes is None else f"it needs {format_bytes(needed_bytes)}, and "
    with suppress(OSError):
        message += f"; {needed}{format_bytes(free_disk(path))} are free there"
    fix = {errno.EIO: "The disk may be failing: look at it", errno.EROFS: "The disk is read-only: mount it so that it can be written"}
    return DiskError(f"{message}. {fix.get(code, 'Make room')}, then give the same command again: what was written before is whole")
