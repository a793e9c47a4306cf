"""Every write to disk: under a temporary name, flushed to the device, then renamed, so that no half file bears a final name.

What a kill can leave behind has a name that begins with a dot and says that it is temporary; ``sweep`` deletes it. A folder that
bears its final name is whole and lists its files with their SHA-256 in its manifest. Nothing else writes or deletes, but lock.py.
"""

import errno
import glob
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import platformdirs
import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor

from qlite.errors import MachineError
from qlite.hashes import sha256, short_hash
from qlite.room import explained

MANIFEST = "manifest.json"
SAFETENSORS_DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
LEFT_OVER = re.compile(r"\..+\.(tmp|old)-([0-9a-f]{8})-(\d+)(?:_(\w*?)\w{8})?")
"""Names of what is being made or deleted: by which machine, by which process of it, and under which key, before mkdtemp's characters."""
IS_WINDOWS = os.name == "nt"
PAUSES = (0.02, 0.05, 0.1, 0.3, 0.6, 1.0)
"""Seconds between the attempts at a rename that Windows refuses."""


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as the whole of ``path``."""
    content = text.encode()
    with explained(path, len(content)), _replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` as one safetensors file. Views of one buffer are written as tensors of their own; nothing else is copied."""
    if metadata:  # the library writes several keys of it in any order, and the same is to give the same bytes
        # The widest first: each begins at a multiple of its values' size.
        widest = dict(sorted(tensors.items(), key=lambda each: -each[1].itemsize))
        table = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in widest.items()}
        write_tensor_file(path, table, (tensor.detach().cpu() for tensor in widest.values()), metadata)
        return
    own, taken = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        memory = tensor.untyped_storage()
        is_its_own = memory.nbytes() == tensor.nbytes and memory.data_ptr() not in taken
        taken.add(memory.data_ptr())
        own[name] = tensor if is_its_own else tensor.clone()
    with explained(path, sum(tensor.nbytes for tensor in own.values())), _replacing(path) as temporary:
        save_file(own, temporary, metadata={"format": "pt"})


def write_tensor_file(
    path: Path, table: dict[str, tuple[torch.dtype, tuple[int, ...]]], pieces: Iterable[Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write one safetensors file of the tensors in ``table``, name to dtype and shape, whose values come in ``pieces``, one after another.

    A piece, on the CPU, is all or a part of one tensor, in its dtype and order in memory: no more than one is held.
    """
    header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, (dtype, shape) in table.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with explained(path, 8 + len(head) + end), new_file(path) as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        written = sum(stream.write(piece.contiguous().view(-1).view(torch.uint8).numpy()) for piece in pieces)
    assert written == end, f"{written} bytes of {end}"


def append_line(path: Path, line: str) -> None:
    """Append one line to a log. A log is no truth to resume from, so it is not flushed to the device."""
    with explained(path, len(line)), path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(line + "\n")


def cache_folder() -> Path:
    """Return the user's cache folder of qlite: $QLITE_CACHE, or what the platform provides for caches."""
    chosen = os.environ.get("QLITE_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("qlite", appauthor=False))


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Give a binary stream whose content becomes ``path`` on leaving; for what is too large to be held in memory first."""
    with explained(path), _replacing(path) as temporary, temporary.open("wb") as stream:
        yield stream


def flush(path: Path) -> None:
    """Wait until a log, if there is one, is on the device as it stands."""
    with explained(path):
        if path.exists():
            _flush(path)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Give an empty folder in ``parent``, so in its file system, that is gone on leaving; ``keep_file`` takes files out of it."""
    with explained(parent):
        make_folder(parent)
        with tempfile.TemporaryDirectory(prefix=f".scratch.tmp-{_me()}_", dir=parent) as scratch:
            yield Path(scratch)


def keep_file(temporary: Path, path: Path) -> None:
    """Give the finished file ``temporary`` its final name, in the same file system."""
    with explained(path):
        make_folder(path.parent)
        _flush(temporary)
        _rename(temporary, path)
        _flush(path.parent)


def remove_file(path: Path) -> None:
    """Delete a file of ours, if it is there."""
    with explained(path):
        path.unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Delete ``folder`` if it is there and nothing is in it."""
    with suppress(OSError):
        folder.rmdir()


def remove_folder(folder: Path) -> bool:
    """Delete a folder that ``new_folder`` made, and return whether it was one; what somebody else has put something into stays.

    It loses its name first, so that a kill in between leaves no half of it under that name.
    """
    if not _is_ours(folder):
        return False
    remove_tree(folder)
    return True


def remove_tree(folder: Path) -> None:
    """Delete ``folder`` with all that other programs have put into it for us, if it is there; it loses its name first."""
    if folder.is_dir() and not folder.is_symlink():
        gone = folder.with_name(f".{folder.name}.old-{_me()}")
        with explained(folder):
            _rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a damaged ``folder``, so that nothing takes it for a whole one, to a name that is free, and return that."""
    names = (f"damaged-{folder.name}{f'-{number}' if number else ''}" for number in itertools.count())
    aside = next(path for name in names if not (path := folder.with_name(name)).exists())
    with explained(folder):
        _rename(folder, aside)
    return aside


def sweep(folder: Path) -> list[str]:
    """Delete what a process that was killed has left half made or half deleted in ``folder``; return the names.

    Only for who holds ``folder``: of other machines' processes nobody knows whether they have ended.
    """
    left = [path for path in folder.iterdir() if _is_left_over(path)] if folder.is_dir() else []
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    return sorted(path.name for path in left)


def make_folder(folder: Path) -> None:
    """Make ``folder`` with all above it, and flush the names of those that were not there."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        _flush(each.parent)


def drop_oldest(folder: Path, budget_bytes: int, keep: Path) -> None:
    """Delete the sub-folders of ``folder`` that were used longest ago, but not ``keep``, until all take at most ``budget_bytes``."""
    found = []
    for sub in folder.glob("[!.]*"):  # what begins with a dot is being made or deleted
        with suppress(OSError):  # another process may delete one meanwhile
            if _is_ours(sub):
                found.append(((sub / MANIFEST).stat().st_mtime, sum(file.stat().st_size for file in sub.glob("*")), sub))
    total = sum(size for _, size, _ in found)
    for _, size, sub in sorted(found):
        if total <= budget_bytes:
            return
        if sub != keep:
            total -= size
            shutil.rmtree(sub, ignore_errors=True)


def can_be_written(folder: Path) -> bool:
    """Return whether files can be put into ``folder``, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def mark_used(folder: Path) -> None:
    """Make ``folder`` the one that ``drop_oldest`` drops last; on a read-only disk nothing happens."""
    with suppress(OSError):
        os.utime(folder / MANIFEST)


@contextmanager
def new_folder(path: Path, key: str | None = None) -> Iterator[Path]:
    """Give a temporary folder to fill; on leaving, add a manifest of SHA-256 sums and rename it to ``path``.

    If filling it fails, nothing is left behind; with a ``key``, what a kill or Ctrl-C leaves is given to the next call with that key.
    An older folder at ``path`` gives way once the new one is complete, but only if it is one that this function made and nobody has
    put anything into.

    Raises:
        MachineError: the disk does not take it, or ``path`` holds something else.
    """
    with explained(path):
        if path.exists() and not _is_ours(path):
            raise MachineError(f'"{path}" holds files that qlite did not write there; choose another folder')
        make_folder(path.parent)
        temporary = _taken_over(path, key) if key else None
        _clear(path, temporary)
        temporary = temporary or Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-{_me()}_{key or ''}", dir=path.parent))
        try:
            yield temporary
            sums = {file.relative_to(temporary).as_posix(): sha256(file) for file in sorted(temporary.rglob("*")) if file.is_file()}
            write_json(temporary / MANIFEST, sums)
            for part in temporary.rglob("*"):
                _flush(part)
            _swap(temporary, path)
        except BaseException as error:
            if key is None or isinstance(error, Exception):
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def is_whole(folder: Path) -> bool:
    """Return whether ``folder`` has a manifest and every file in it has the sum it says."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8")) if (folder / MANIFEST).is_file() else {}
        # A pipe in a file's place would be waited for.
        return bool(sums) and all((folder / name).is_file() and sha256(folder / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    if LEFT_OVER.fullmatch(path.parent.name):  # the folder is being made: it is flushed, and gets its name, as a whole
        yield path
        return
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.tmp-{_me()}")
    try:
        yield temporary
        _flush(temporary)
        _rename(temporary, path)
        _flush(path.parent)
    except BaseException:
        with suppress(OSError):  # what went wrong before is what is told
            temporary.unlink(missing_ok=True)
        raise


def _me() -> str:
    """Return what stands in the names of what this process has not finished."""
    return f"{short_hash(platform.node())[:8]}-{os.getpid()}"


def _is_left_over(path: Path) -> bool:
    """Return whether ``path`` is half made or half deleted, and not by a process of this machine that is still there (an export)."""
    found = LEFT_OVER.fullmatch(path.name)
    return found is not None and not (_is_mine(found) and psutil.pid_exists(int(found[3])))


def _is_mine(found: re.Match) -> bool:
    return _me().startswith(f"{found[2]}-")


def _taken_over(path: Path, key: str) -> Path | None:
    """Return, as this process's own, what one that has ended, or an earlier call of this, left of ``path`` under ``key``; None without."""
    for other in path.parent.glob(f"[.]{glob.escape(path.name)}.tmp-*_{key}*"):
        found = LEFT_OVER.fullmatch(other.name)
        if found and _is_mine(found) and (_is_left_over(other) or found[3] == str(os.getpid())):
            mine = path.with_name(f".{path.name}.tmp-{_me()}_{key}{short_hash(other.name)[:8]}")
            with suppress(OSError):  # another process was quicker
                _rename(other, mine)
                return mine
    return None


def _clear(path: Path, keep: Path | None) -> None:
    """Delete what is left half made or half deleted of ``path`` by ended processes of this machine, or calls of this one with a key.

    If it has ended between taking the old folder away and giving the new one its name, the old one is put back.
    """
    for other in path.parent.iterdir():
        found = LEFT_OVER.fullmatch(other.name)
        is_of_it = found and _is_mine(found) and other != keep and other.name.startswith(f".{path.name}.{found[1]}-")
        if not is_of_it or not (_is_left_over(other) or (found[4] and found[3] == str(os.getpid()))):  # without a key: a thread's
            continue
        if found[1] == "old" and not path.exists() and is_whole(other):
            _rename(other, path)
        else:
            shutil.rmtree(other, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Return whether ``folder`` holds nothing but what its manifest lists."""
    try:
        listed = set(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()} <= listed | {MANIFEST}


def _swap(temporary: Path, path: Path) -> None:
    os.chmod(temporary, 0o755)  # mkdtemp makes it private
    _flush(temporary)
    old = None
    if path.exists():
        old = path.with_name(f".{path.name}.old-{_me()}")
        _rename(path, old)
    try:
        _rename(temporary, path)
    except BaseException:
        if old is not None:
            with suppress(OSError):  # what went wrong before is what is told
                _rename(old, path)
        raise
    _flush(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _rename(path: Path, name: Path) -> None:
    """Give ``path`` the name ``name``. Windows refuses while a virus scanner or an indexer has either open: then it is asked again."""
    for pause in PAUSES if IS_WINDOWS else ():
        try:
            os.replace(path, name)
            return
        except PermissionError:
            time.sleep(pause)
    os.replace(path, name)


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the device."""
    if path.is_dir() and IS_WINDOWS:  # which has no handle for a folder
        return
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            _to_device(handle)
        finally:
            os.close(handle)
    except OSError as error:
        # Some file systems (FUSE, SMB) know no flush of a folder, and some folders can be written to and not read.
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM):
            raise


def _to_device(handle: int) -> None:
    if sys.platform == "darwin":  # there fsync leaves it in the drive's own memory
        from fcntl import F_FULLFSYNC, fcntl

        with suppress(OSError):  # a network drive may not know it
            fcntl(handle, F_FULLFSYNC)
            return
    os.fsync(handle)
