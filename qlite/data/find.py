"""Which files a path means: one file, all of a folder, or those that a pattern matches; or that it means no file but the hub."""

import difflib
import glob
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from qlite.data.blocks import HEAD_BYTES, DataFile, opened, shown, what_it_is
from qlite.errors import DataError

FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
TEXT_SUFFIXES = (".txt", ".md")
"""Endings of raw text."""
PACKED_SUFFIXES = (".gz", ".zip", ".bz2", ".xz", ".zst", ".tar", ".7z", ".xlsx", ".arrow")
ABOUT_DATA = ("README", "LICENSE", "LICENCE", "COPYING", "NOTICE", "CHANGELOG")
LISTED = 5


def is_hub(path: str) -> bool:
    """Return whether ``path`` means a hub data set: "org/name", and neither something on this disk nor a data file's name."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path, re.ASCII) is not None
    return is_id and not path.lower().endswith((*FILE_SUFFIXES, *PACKED_SUFFIXES)) and not os.path.lexists(path)


def find_files(path: str) -> list[DataFile]:
    """Return the files that ``path``, which is no hub id, means; sorted by name.

    In a folder, hidden files and files of unknown kinds are left out; README, LICENSE and the like too, where they are raw text
    beside files of rows. In a pattern, ** stands for any folders.

    Raises:
        DataError: there is no such file, or none of a kind that is read.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = [DataFile(file, file.relative_to(path).as_posix()) for file in _files_below(Path(path))]
        return _of_known_kinds(found, f'the folder "{shown(path)}"', is_folder=True)
    if os.path.lexists(path):
        file = DataFile(Path(path), shown(Path(path).name))
        if file.path.suffix.lower() not in FILE_SUFFIXES:
            raise DataError(_unknown_kind(file))
        return [file]
    if glob.has_magic(path):
        base = _folder_of(path)
        found = [DataFile(file, file.relative_to(base).as_posix()) for file in _matching(path)]
        if not found:
            raise DataError(f'no file is called like "{shown(path)}"; {folder_says(base)}')
        return _of_known_kinds(found, f'"{shown(path)}"')
    raise DataError(_missing(path))


def _files_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield all files in and below ``folder`` but hidden ones; links are followed."""
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(f'the link "{shown(str(folder))}" leads back to a folder that it lies in, so there is no end of files; remove it')
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f'cannot look into the folder "{shown(str(folder))}" ({error.strerror})') from error
    for entry in entries:
        if os.path.isdir(folder / entry.name):  # not entry.is_dir(), which fails on a link to itself
            yield from _files_below(folder / entry.name, (*above, real))
        else:
            yield folder / entry.name


def _of_known_kinds(found: list[DataFile], place: str, is_folder: bool = False) -> list[DataFile]:
    """Return those of ``found`` that are read, sorted; what is written about data in a folder is none of its rows."""
    known = sorted((file for file in found if file.path.suffix.lower() in FILE_SUFFIXES), key=lambda file: file.name)
    texts = [file for file in known if file.path.suffix.lower() in TEXT_SUFFIXES]
    if is_folder and len(texts) < len(known):
        known = [file for file in known if file not in texts or file.path.stem.upper() not in ABOUT_DATA]
    if not known:
        names = sorted(shown(file.name) for file in found)
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        holds = f"only {', '.join(names[:LISTED])}{more}" if names else "no file"
        raise DataError(f"{place} holds {holds}; files that are read end in {', '.join(FILE_SUFFIXES)}")
    return [DataFile(file.path, shown(file.name)) for file in known]


def _matching(pattern: str) -> set[Path]:
    """Return the files that ``pattern`` matches; ** stands for any folders, and hidden files are left out."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return {Path(name) for name in glob.glob(pattern) if not os.path.isdir(name)}
    at = parts.index("**")
    tail = [*parts[at:], "*"] if parts[-1] == "**" else parts[at:]
    roots = glob.glob(str(Path(*parts[:at]))) if at else ["."]
    files = ((Path(root), file) for root in roots if os.path.isdir(root) for file in _files_below(Path(root)))
    return {file for root, file in files if _fits(file.relative_to(root).parts, tuple(tail))}


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _folder_of(pattern: str) -> Path:
    """Return the folder above the first part of ``pattern`` that matches more than one name."""
    parts = Path(pattern).parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


# Messages


def _unknown_kind(file: DataFile) -> str:
    with opened(file) as stream:
        what = what_it_is(stream.read(HEAD_BYTES))
    return f"{file.name}: {what or 'is of no kind that is read; rename it to what it is: ' + ', '.join(FILE_SUFFIXES)}"


def _missing(path: str) -> str:
    hub = "" if "/" in path or "." in path else '; a hub data set is written "org/name"'
    return f'there is no "{shown(path, 200)}"{hub}; {folder_says(Path(path).parent, Path(path).name)}'


def folder_says(folder: Path, name: str = "") -> str:
    """Return what is in ``folder`` instead of ``name``, or that there is no such folder."""
    place = shown(str(folder.absolute()), 200)
    if not os.path.isdir(folder):
        return f'there is no folder "{place}"'
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f'cannot look into the folder "{place}" ({error.strerror})'
    near = difflib.get_close_matches(name, names, n=3) if name else []
    if near:
        return "did you mean " + " or ".join(f'"{shown(str(folder / close))}"' for close in near) + f'? The folder looked in is "{place}"'
    return f'the folder looked in is "{place}"'
