"""Every write to disk: under a temporary name, flushed to the device, then renamed, so that no half file bears a final name."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import platformdirs
from safetensors.torch import save_file
from torch import Tensor

from qlite.errors import MachineError

MANIFEST = "manifest.json"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as the whole of ``path``."""
    with _explained(path), _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write ``tensors`` as one safetensors file. Views of one buffer are written as tensors of their own; nothing else is copied."""
    own, taken = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        memory = tensor.untyped_storage()
        is_its_own = memory.nbytes() == tensor.nbytes and memory.data_ptr() not in taken
        taken.add(memory.data_ptr())
        own[name] = tensor if is_its_own else tensor.clone()
    with _explained(path), _replacing(path) as temporary:
        save_file(own, temporary, metadata={"format": "pt", **(metadata or {})})


def append_line(path: Path, line: str) -> None:
    """Append one line to a log. A log is no truth to resume from, so it is not flushed to the device."""
    with _explained(path), path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(line + "\n")


def cache_folder() -> Path:
    """Return the user's cache folder of qlite: $QLITE_CACHE, or what the platform provides for caches."""
    chosen = os.environ.get("QLITE_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("qlite", appauthor=False))


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Give a binary stream whose content becomes ``path`` on leaving; for what is too large to be held in memory first."""
    with _explained(path), _replacing(path) as temporary, temporary.open("wb") as stream:
        yield stream


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


def free_disk(path: Path) -> int:
    """Return the bytes that can still be written where ``path`` is, or will be."""
    there = next(place for place in (path, *path.parents) if place.exists())
    return shutil.disk_usage(there).free


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
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on leaving, add a manifest of SHA-256 sums and rename it to ``path``.

    If filling it fails, nothing is left behind. An older folder at ``path`` gives way once the new one is complete, but only
    if it is one that this function made and nobody has put anything into.

    Raises:
        MachineError: the disk does not take it, or ``path`` holds something else.
    """
    with _explained(path):
        if path.exists() and not _is_ours(path):
            raise MachineError(f'"{path}" holds files that qlite did not write there; choose another folder')
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
        try:
            yield temporary
            files = sorted(file for file in temporary.rglob("*") if file.is_file())
            sums = {file.relative_to(temporary).as_posix(): sha256(file) for file in files}
            write_json(temporary / MANIFEST, sums)
            _swap(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def is_whole(folder: Path) -> bool:
    """Return whether ``folder`` has a manifest and every file in it has the sum it says."""
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all(sha256(folder / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def short_hash(text: str) -> str:
    """Return 32 digits of the SHA-256 of ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def code_hash(folders: Iterable[Path], libraries: Iterable[str]) -> str:
    """Return a hash of the Python files in ``folders`` and of the installed ``libraries``' versions: what other code made is made anew."""
    code = b"".join(path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(code + json.dumps([version(name) for name in libraries]).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.replace(path, old)
    os.replace(temporary, path)
    _flush(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the device."""
    if path.is_dir() and os.name == "nt":  # Windows has no handle for a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(f'cannot write "{path}": {error.strerror or error}') from error
