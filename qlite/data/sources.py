"""Where rows come from: a file, a folder, a pattern or a hub data set, read row by row in flat memory."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

from pydantic import Field

from qlite.data.blocks import DataFile, Told, opened
from qlite.data.find import FILE_SUFFIXES as FILE_SUFFIXES
from qlite.data.find import find_files, folder_says, is_hub
from qlite.data.formats import FormatName
from qlite.data.hub import HubData, hub_commit, hub_rows
from qlite.data.rows import Row, read_json, read_jsonl
from qlite.data.tables import read_csv, read_pairs, read_parquet, read_text
from qlite.errors import DataError
from qlite.table import Table

# Ending -> how such a file is read, and what one without rows holds.
KINDS: dict[str, tuple[Callable[[DataFile, Told], Iterator[Row]], str]] = {
    ".jsonl": (read_jsonl, "only blank lines"),
    ".ndjson": (read_jsonl, "only blank lines"),
    ".json": (read_json, "only an empty list"),
    ".csv": (read_csv, "only the names of fields"),
    ".tsv": (read_csv, "only the names of fields"),
    ".parquet": (read_parquet, "no rows"),
    ".txt": (read_text, "only blank lines"),
    ".md": (read_text, "only blank lines"),
}


@dataclass(frozen=True, kw_only=True)
class Source(Table):
    """One source of rows."""

    path: Annotated[str, Field(min_length=1)]
    """A .jsonl, .json, .csv, .tsv, .parquet, .txt or .md file, a folder, a pattern ("data/**/*.jsonl"), or a hub data set "org/name"."""
    name: str | None = None
    """Configuration (subset) of a hub data set."""
    split: str | None = None
    """Split of a hub data set, or a part of one: "train[:5%]"; by default "train"."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    stream: bool = False
    """Read a hub data set row by row over the network, without downloading the whole."""
    rows: Annotated[int, Field(ge=1)] | None = None
    """Read only so many rows, the first ones."""
    separator: Annotated[str, Field(min_length=1)] | None = None
    """In .txt files: each line is a row, cut at the first of these into prompt and completion."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Passes over this source in one epoch: 2 shows each row twice, 0.5 a fixed half of them once."""
    format: FormatName | None = None
    """Schema of its rows, where it is not data.format."""
    columns: dict[str, str] | None = None
    """What it calls our fields, where that is not data.columns."""
    roles: dict[str, str] | None = None
    """What it calls the speakers, where that is not data.roles."""


def read_rows(source: Source, key: str, told: Told = lambda _: None) -> Iterator[Row]:
    """Yield the rows of ``source``, whose key in the recipe is ``key``; files come in the order of their names.

    ``told`` hears from time to time how many of ``source_bytes`` have been read. Files are looked for now, read when rows are asked for.

    Raises:
        DataError: a file is missing, of no known kind, malformed (with its line) or without rows; or the hub data set cannot be had.
    """
    if is_hub(source.path):
        rows = _hub_rows(source)
    else:
        with _blamed_on(key):
            files = find_files(source.path)
        rows = _file_rows(source, files, told)
    return _with_key(islice(rows, source.rows), key)


def source_files(source: Source, key: str) -> list[Path]:
    """Return the files of ``source`` in the order in which they are read; none for a hub data set.

    Raises:
        DataError: there is no such file, or none of a kind that is read.
    """
    with _blamed_on(key):
        return [] if is_hub(source.path) else [file.path for file in find_files(source.path)]


def source_bytes(source: Source, key: str) -> int:
    """Return the size of the files of ``source`` in bytes; 0 for a hub data set, whose size is not known.

    Raises:
        DataError: as ``source_files``.
    """
    return sum(_size(path) for path in source_files(source, key))


def fingerprint(source: Source, key: str) -> str:
    """Return a SHA-256, in hexadecimal, of all that decides which rows ``read_rows`` yields.

    Of files: names and contents, not the folder they lie in nor their dates. Of a hub data set: id, configuration, split and the commit
    that the revision means now.

    Raises:
        DataError: as ``read_rows``, but for what is inside the files.
    """
    with _blamed_on(key):
        if is_hub(source.path):
            with _perhaps_on_disk(source.path):
                commit = hub_commit(_hub(source))
            facts = {"hub": source.path, "name": source.name, "split": source.split or "train", "commit": commit}
        else:
            files = find_files(source.path)
            facts = {"files": [[file.name, _sha256(file)] for file in files]}
            if any(file.path.suffix.lower() == ".txt" for file in files):
                facts["separator"] = source.separator
    return hashlib.sha256(json.dumps({**facts, "rows": source.rows}, sort_keys=True).encode()).hexdigest()


# Reading


@contextmanager
def _blamed_on(key: str) -> Iterator[None]:
    """Put ``key`` before what a DataError says."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def _with_key(rows: Iterator[Row], key: str) -> Iterator[Row]:
    with _blamed_on(key):
        yield from rows


def _file_rows(source: Source, files: list[DataFile], told: Told) -> Iterator[Row]:
    before = 0
    for file in files:
        read, nothing = KINDS[file.path.suffix.lower()]
        if source.separator is not None and file.path.suffix.lower() == ".txt":
            read = partial(read_pairs, separator=source.separator)
        row = None
        for row in read(file, lambda done, before=before: told(before + done)):
            yield row
        size = _size(file.path)
        if row is None:
            raise DataError(f"{file.name}: holds {nothing if size else 'nothing (0 bytes)'}; fill or remove it")
        before += size


def _hub_rows(source: Source) -> Iterator[Row]:
    row = None
    with _perhaps_on_disk(source.path):
        for row in hub_rows(_hub(source)):
            yield row
    if row is None:
        raise DataError(f'"{source.path}" has no rows in split "{source.split or "train"}"; give another split')


def _hub(source: Source) -> HubData:
    return HubData(source.path, source.name, source.split or "train", source.revision, source.stream)


@contextmanager
def _perhaps_on_disk(path: str) -> Iterator[None]:
    """Say which files are near, if ``path``, taken for a hub id, may have been meant for a file in an existing folder."""
    try:
        yield
    except DataError as error:
        if not Path(path).parent.is_dir():
            raise
        raise DataError(f"{error}. On this disk, {folder_says(Path(path).parent, Path(path).name)}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # said with its reason when the file is read
        return 0


def _sha256(file: DataFile) -> str:
    with opened(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
