"""Rows of a data set as dictionaries: from a local .jsonl or .json file, or a data set of the Hugging Face hub."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qlite.errors import DataError


@dataclass(frozen=True)
class Row:
    """One row and where it stands, for messages: "orders.jsonl line 12"."""

    fields: dict
    where: str


def read_rows(source: str, split: str = "train", key: str = "data.train") -> list[Row]:
    """Return all rows of ``source``: a path ending in .jsonl or .json, or a hub data set's id.

    Raises:
        DataError: the file is missing, empty or malformed (with its line), or the data set cannot be had.
    """
    path = Path(source)
    with suppress(RuntimeError):  # "~nobody": no such user, so no such file, which is said below
        path = path.expanduser()
    if path.suffix == ".jsonl":
        rows = list(_jsonl(_text(path, key), path.name))
    elif path.suffix == ".json":
        rows = _json(_text(path, key), path.name)
    elif path.exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise DataError(f'{key}: "{source}" is not a .jsonl or .json file, and no hub data set ("org/name")')
    else:
        rows = _hub(source, split, key)
    if not rows:
        raise DataError(f"{key}: {source} has no rows")
    return rows


def _text(path: Path, key: str) -> str:
    try:
        # utf-8-sig: a byte order mark, which Windows editors write, is not part of the first row.
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f'{key}: cannot read "{path}" ({error.strerror}); the folder looked in is {Path.cwd()}') from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} byte {error.start}: not UTF-8; convert the file, for example with iconv") from error


def _jsonl(text: str, name: str) -> Iterator[Row]:
    # Not splitlines(): U+2028 and its kin may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _row(_parse(line, f"{name} line {number}"), f"{name} line {number}")


def _json(text: str, name: str) -> list[Row]:
    rows = _parse(text, name)
    if not isinstance(rows, list):
        raise DataError(f"{name}: a .json data file is one list of rows, this one is a {type(rows).__name__}; one row a line is .jsonl")
    return [_row(row, f"{name} row {number}") for number, row in enumerate(rows, start=1)]


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error


def _row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f'{where}: a row is an object like {{"prompt": ..., "completion": ...}}, this one is a {type(value).__name__}')
    return Row(value, where)


def _hub(source: str, split: str, key: str) -> list[Row]:
    from datasets import load_dataset  # slow to import, and only hub data needs it

    try:
        dataset = load_dataset(source, split=split)
    except Exception as error:  # the library raises dozens of types, from connection errors to missing splits
        raise DataError(f'{key}: cannot load data set "{source}" (split "{split}") from the hub: {str(error).splitlines()[0]}') from error
    return [Row(dict(fields), f"{source} row {number}") for number, fields in enumerate(dataset, start=1)]
