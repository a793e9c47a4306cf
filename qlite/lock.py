"""One run at a time in a folder: a lock that the system itself gives up when its holder ends, however it ends."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

from qlite.errors import RunError
from qlite.files import make_folder
from qlite.room import explained

LOCK = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process alone until leaving. It is made if need be, and gone again if nothing is in it then.

    The system gives the lock up when its holder ends, however it ends: there are no stale ones.

    Raises:
        RunError: another process holds it, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f'"{folder}" is a file, and a folder is to be written there; choose another output.dir')
    with explained(folder):
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        handle = _lock(folder)
    try:
        yield
    finally:
        # While it is held, so that who waits for it sees that this file is no longer the folder's; on Windows an open file has to stay.
        steps = [lambda: (folder / LOCK).unlink(), lambda: os.close(handle)]
        for step in reversed(steps) if os.name == "nt" else steps:
            with suppress(OSError):
                step()
        for each in made:
            with suppress(OSError):  # something is in it
                each.rmdir()


def _lock(folder: Path) -> int:
    """Return a handle of the folder's lock file, locked by this process, with its number in it."""
    path = folder / LOCK
    while True:
        make_folder(folder)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # who held the folder has just removed it
            continue
        try:
            if not _is_locked(handle):
                raise RunError(f'"{folder}": process {_holder(path)} is training there; wait for it, stop it, or choose another output.dir')
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):  # else who held it has just deleted it
                    os.truncate(handle, 0)
                    os.write(handle, f" {os.getpid()}\n".encode())  # the first byte is what Windows locks
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_locked(handle: int) -> bool:
    try:
        return lock_descriptor(handle, blocking=False)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            return True  # a file system without locks: as alone there as one can be
        raise


def _holder(path: Path) -> str:
    for _ in range(20):
        with suppress(OSError), path.open("rb") as file:
            file.seek(1)
            if number := file.read(20).strip():
                return number.decode(errors="replace")
        time.sleep(0.05)  # it has locked the file and not yet written its number
    return "of an unknown number"
