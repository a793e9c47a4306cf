"""Every call of a process that changes one folder, counted: at any of them it can die, or be told that the disk is full."""

import builtins
import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from qlite import files

KILLED = 9
CHANGING = ("mkdir", "replace", "rename", "unlink", "rmdir", "fsync", "utime", "chmod", "truncate", "open")


@dataclass
class Faults:
    """What happens at which call. Calls are counted from 0, those inside ``folder`` alone, once ``since`` has been called."""

    folder: str
    die_before: int | None = None
    die_after: int | None = None
    refuse: int | None = None
    """The number of the first call that fails, as all later ones do, with ``error``."""
    error: int = errno.ENOSPC
    only: tuple[str, ...] = ()
    """Kinds of calls that are counted; all, if empty."""
    is_awake: bool = True
    contents: str = ""
    """A folder that gets every flushed file's content, under the number of the flush."""
    log: list[tuple] = field(default_factory=list)

    def install(self) -> None:
        """Put this between the process and the file system; there is no way back."""
        for name in CHANGING:
            setattr(os, name, self._around(name, getattr(os, name)))
        open_before, save_before = io.open, files.save_file

        def open_watched(file, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+") or not self._is_inside(file):
                return open_before(file, mode, *args, **kwargs)
            number = self._event("open", str(file))
            opened = open_before(file, mode, *args, **kwargs)
            self._after(number)
            return _Writing(opened, self, str(file))

        def save_watched(tensors, filename, metadata=None):
            if not self._is_inside(filename):
                return save_before(tensors, filename, metadata)
            number = self._count("write", str(filename))
            if number is not None and self._refuses(number):
                raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(self.error)} (os error {self.error})")
            save_before(tensors, filename, metadata)
            if number == self.die_before and number is not None:
                with open_before(filename, "r+b") as torn:
                    torn.truncate(os.path.getsize(filename) // 2)
                os._exit(KILLED)
            self._after(number)

        builtins.open = io.open = open_watched
        files.save_file = save_watched

    def _around(self, name: str, function: Callable) -> Callable:
        def around(*args, **kwargs):
            path = self._path(name, args, kwargs)
            is_change = name != "open" or bool(args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if not is_change or not self._is_inside(path):
                return function(*args, **kwargs)
            more = (str(args[1]),) if name in ("replace", "rename") else ()
            number = self._event(name, path, *more)
            try:
                return function(*args, **kwargs)
            finally:  # a folder that is there already is an error that most callers expect
                self._after(number)

        return around

    def _event(self, kind: str, *what: str) -> int | None:
        number = self._count(kind, *what)
        if number is not None:
            if number == self.die_before:
                os._exit(KILLED)
            if self._refuses(number):
                raise OSError(self.error, os.strerror(self.error), what[0])
        return number

    def _refuses(self, number: int) -> bool:
        return self.refuse is not None and number >= self.refuse

    def _count(self, kind: str, *what: str) -> int | None:
        """Return the number of this call, None if it is not counted."""
        if not self.is_awake or (self.only and kind not in self.only):
            return None
        self.log.append((kind, *what))
        if self.contents and kind == "fsync" and os.path.isfile(what[0]):
            shutil.copyfile(what[0], os.path.join(self.contents, str(len(self.log) - 1)))
        return len(self.log) - 1

    def _after(self, number: int | None) -> None:
        if number is not None and number == self.die_after:
            os._exit(KILLED)

    def _path(self, name: str, args: tuple, kwargs: dict) -> str:
        place = args[0]
        if isinstance(place, int):
            return _name_of(place)
        folder = kwargs.get("dir_fd")
        return os.fspath(place) if folder is None else os.path.join(_name_of(folder), os.fspath(place))

    def _is_inside(self, path: object) -> bool:
        return not isinstance(path, int) and os.path.abspath(os.fspath(path)).startswith(self.folder)


class _Writing:
    """A file that is being written: every write counts."""

    def __init__(self, file, faults: Faults, path: str):
        self._file, self._faults, self._path = file, faults, path

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def __enter__(self) -> "_Writing":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content) -> int:
        number = self._faults._count("write", self._path)
        if number is not None and self._faults._refuses(number):
            raise OSError(self._faults.error, os.strerror(self._faults.error), self._path)
        if number is not None and number == self._faults.die_before:
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            os._exit(KILLED)
        written = self._file.write(content)
        self._file.flush()
        self._faults._after(number)
        return written


def _name_of(handle: int) -> str:
    return os.readlink(f"/proc/self/fd/{handle}")


def said(path: Path) -> list:
    """Return what a victim has left in ``path`` as JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
