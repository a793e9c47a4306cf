"""Files that a user or a stranger gives: only regular ones are opened, none larger than it can need to be, and JSON says things once."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

from qlite.errors import shown
from qlite.units import MIB, format_bytes

MOST_JSON_BYTES = 32 * MIB
"""Of a config or an index of weights: the longest that are known have 10 MB, and Python's values of one take up to 20 times its size."""
HEADER_LENGTH_BYTES = 8


def read_given(path: str | Path, most_bytes: int) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: it cannot be read, is larger than ``most_bytes``, or is no regular file: opening a pipe would wait for ever, and
            /dev/zero never ends. Its ``strerror`` says which.
    """
    require_regular(path)
    with open(path, "rb") as stream:
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        size = format_bytes(max(len(content), os.path.getsize(path)))
        raise OSError(errno.EFBIG, f"it has {size}, and at most {format_bytes(most_bytes)} of such a file are read")
    return content


def require_regular(path: str | Path) -> None:
    """Raise OSError unless ``path`` is a regular file or a link to one."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:
        raise OSError(errno.EINVAL, "no file's name holds a NUL byte") from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {sort_of(mode)}, and only regular files are read")


def sort_of(mode: int) -> str:
    """Return what a file of ``mode`` is, if no regular one."""
    sorts = {stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
    return "a folder" if stat.S_ISDIR(mode) else sorts.get(stat.S_IFMT(mode), "no file")


def parse_json(content: bytes, says_once: bool = False) -> object:
    """Return what UTF-8 JSON says; ``says_once``: a key that stands twice in one object is refused, as only one value would be kept.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read.
    """
    hook: Callable | None = _once if says_once else None
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=hook)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def require_sound_table(path: str | Path) -> None:
    """Raise ValueError if the table of a safetensors file breaks a rule of the format that the safetensors library does not look at.

    They are: it begins with "{", and it names no tensor twice. Source: github.com/huggingface/safetensors, README, "Format". Of a file
    that is otherwise malformed nothing is said: the library does.
    """
    require_regular(path)
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
        if length > os.path.getsize(path):
            return
        if length > MOST_JSON_BYTES:
            raise ValueError(f"its table of tensors has {format_bytes(length)}, and at most {format_bytes(MOST_JSON_BYTES)} are read")
        table = stream.read(length)
    if not table.startswith(b"{"):
        raise ValueError('its table of tensors does not begin with "{"')
    try:
        parse_json(table, says_once=True)
    except _Twice:
        raise
    except ValueError:
        return


class _Twice(ValueError):
    """A key stands twice in one object."""


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys, seen = [key for key, _ in pairs], set()
        twice = next(key for key in keys if key in seen or seen.add(key))
        raise _Twice(f'"{shown(twice)}" stands twice in it, and only one of the two would be kept')
    return found
