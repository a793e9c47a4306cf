"""One row and where it stands; and rows out of JSON, one a line or in one list, with nothing in them that is not JSON."""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from qlite.data.blocks import DataFile, Told, opened, shown, text_blocks
from qlite.errors import DataError
from qlite.units import GIB, MIB, format_bytes

LARGEST_JSON_BYTES = 2 * GIB
BLANKS = " \t\r\n"
A_ROW = 'a row is an object like {"prompt": ..., "completion": ...}'
# The list in an object with such a key is one conversation, so the object is one row and not a file of rows.
CONVERSATIONS = ("messages", "conversations", "conversation")
JSON_HINTS = {
    "Expecting property name": "; keys stand in double quotes, and no comma stands after the last one",
    "Extra data": "; one row a line, nothing after it",
    "Invalid control character": "; inside a string a line break is written \\n, a tab \\t",
    "Invalid \\escape": "; a backslash is written \\\\",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands."""

    fields: dict
    file: str
    """The file's name, relative to the folder or pattern that was given; or the id of a hub data set."""
    number: int
    """Counted from 1."""
    unit: str = "line"
    """What ``number`` counts: "line" (where the row begins) for jsonl, csv and txt; "row" for json, parquet and the hub."""
    goes_on: bool = False
    """Whether the next row is the same document's next piece."""

    @property
    def where(self) -> str:
        """The row's place, for messages: "orders.jsonl line 12"."""
        return f"{self.file} {self.unit} {self.number}"


def read_jsonl(file: DataFile, told: Told) -> Iterator[Row]:
    """Yield the rows of a .jsonl file: one JSON object a line; blank lines are left out.

    Raises:
        DataError: a line is not JSON, no object, or holds what JSON has not or a tokenizer cannot take.
    """
    before, name = 0, file.name
    for block in text_blocks(file, told):
        # Not splitlines(): U+2028 and its kin may stand inside a JSON string.
        lines = block.split("\n")
        is_cut = bool(lines[-1])  # only the end of the file can leave a line without a line end
        if not is_cut:
            lines.pop()
        last = before + len(lines) if is_cut else 0
        for number, line in enumerate(lines, before + 1):
            text = line.strip(BLANKS)
            if not text:
                continue
            try:
                value, end = DECODER.scan_once(text, 0)
            except (ValueError, RecursionError, StopIteration):
                end = -1
            if end != len(text):
                raise _line_problem(text, f"{file.name} line {number}", number == last)
            if value.__class__ is not dict or ("\\" in text and "\\u" in text):
                _require_row(value, PERHAPS_HALF.search(text) is not None, f"{file.name} line {number}")
            yield Row(value, name, number)
        before += len(lines)


def read_json(file: DataFile, told: Told) -> Iterator[Row]:
    """Yield the rows of a .json file: one list of objects, or one object that holds exactly one such list ({"data": [...]}).

    The file's whole text is held in memory (and in the second case all its rows), so large sets of rows are better kept as .jsonl.

    Raises:
        DataError: the file is larger than 2 GiB, not JSON, not such a list, or a row holds what JSON has not.
    """
    with opened(file) as stream:
        size = stream.seek(0, os.SEEK_END)
    if size > LARGEST_JSON_BYTES:
        raise DataError(f"{file.name}: {format_bytes(size)}, and a .json file is read whole; make it .jsonl: jq -c '.[]' FILE > NEW")
    text = "".join(text_blocks(file, lambda _: None, any_line=True))
    if not text.strip(BLANKS):
        return
    is_suspect, reported = PERHAPS_HALF.search(text) is not None, 0
    items = _list_items(text, file) if text.lstrip(BLANKS).startswith("[") else _inner_list(text, file)
    for number, (value, end) in enumerate(items, start=1):
        _require_row(value, is_suspect, f"{file.name} row {number}")
        yield Row(value, file.name, number, "row")
        if end - reported > MIB:
            reported = end
            told(size * end // len(text))
    told(size)


def _list_items(text: str, file: DataFile) -> Iterator[tuple[object, int]]:
    """Yield each item of the JSON list ``text`` and where it ends: item by item, so that an error can name the row."""
    at, number = _after_blanks(text, text.index("[") + 1), 0
    mark = "]" if text[at : at + 1] == "]" else ","
    while mark != "]":
        number += 1
        try:
            value, at = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _document_problem(error, file, f"{file.name} row {number}, line {text.count(chr(10), 0, at) + 1}") from error
        yield value, at
        at = _after_blanks(text, at)
        mark = text[at : at + 1]
        if mark not in ("]", ","):
            raise _document_problem(json.JSONDecodeError("Expecting ',' delimiter", text, at), file)
        at = _after_blanks(text, at + 1) if mark == "," else at
    end = _after_blanks(text, at + 1)
    if end != len(text):
        raise _document_problem(json.JSONDecodeError("Extra data", text, end), file)


def _inner_list(text: str, file: DataFile) -> Iterator[tuple[object, int]]:
    """Yield the items of the one list of objects in the JSON object ``text``."""
    wanted = f"{file.name}: a .json data file is one list of rows, or an object that holds exactly one"
    try:
        document = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _document_problem(error, file) from error
    if not isinstance(document, dict):
        raise DataError(f"{wanted}; this one is {_sort_of(document)}")
    lists = [key for key, value in document.items() if isinstance(value, list) and value and all(isinstance(v, dict) for v in value)]
    if any(key in CONVERSATIONS for key in lists):
        raise DataError(f'{wanted}; this one is a single conversation (key "{lists[0]}"): write [ before and ] after it')
    if len(lists) != 1:
        keys = ", ".join(f'"{shown(key)}"' for key in list(document)[:8]) or "no keys"
        raise DataError(f"{wanted}; this object has {len(lists)} lists of objects (its keys: {keys}); one row a line is .jsonl")
    for value in document[lists[0]]:
        yield value, len(text)


def _after_blanks(text: str, at: int) -> int:
    return WHITESPACE.match(text, at).end()


# What JSON has not, though Python's reader takes it


class _Refused(ValueError):
    """Something that Python's reader would take; the message says what and the fix."""


def _object(pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise _Refused(f'the key "{shown(twice)}" stands twice in one object, and only one value would be kept; remove one')
    return fields


def _constant(token: str) -> float:
    raise _Refused(f"not JSON ({token} is no JSON number); write null, or text in quotes")


def _float(token: str) -> float:
    value = float(token)
    if math.isinf(value):
        raise _Refused(f"the number {shown(token, 30)} is too large for a 64-bit float; write it as text in quotes")
    return value


WHITESPACE = re.compile(r"[ \t\n\r]*")
# Only an escape can bring half a character into a row: no UTF-8 bytes decode to one. What may do so:
# a high surrogate without a low one behind it, a low one without a high one before it, or a backslash that escapes another.
PERHAPS_HALF = re.compile(r"\\(?:\\u[dD]|u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|[c-fC-F](?<!\\u[dD][89abAB]..\\u[dD][c-fC-F])))", re.DOTALL)
ENCODER = json.JSONEncoder(ensure_ascii=False, check_circular=False)
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)


def _require_row(value: object, is_suspect: bool, where: str) -> None:
    """Raise DataError unless ``value`` is a row that a tokenizer can take; ``is_suspect``: it may hold halves of characters."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: {A_ROW}, this one is {_sort_of(value)}")
    if not is_suspect:
        return
    try:
        ENCODER.encode(value).encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{where}: {code} is half a character (a lone surrogate), which no tokenizer takes; remove it") from error
    except RecursionError as error:
        raise DataError(f"{where}: {_reason(error)}") from error


def _sort_of(value: object) -> str:
    names = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), "null")


# Messages


def _line_problem(text: str, where: str, is_cut: bool) -> DataError:
    """Return what is wrong with ``text``, a line that is not JSON; ``is_cut``: the file ends with it and without a line end."""
    try:
        DECODER.decode(text)
        raise AssertionError("a line that failed to parse has parsed")
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(text) or error.msg.startswith("Unterminated string")
        hint = _hint(error)
        if at_end and is_cut:
            hint = "; the file ends inside this row: it was cut off. Get the whole file, or remove the line"
        elif at_end or text in ("[", "{"):
            hint = "; a row stands on one line: rows written over several lines belong in a list in a .json file"
        return DataError(f"{where}: not JSON ({error.msg} at column {error.pos + 1}){hint}")
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: {_reason(error)}")


def _document_problem(error: ValueError | RecursionError, file: DataFile, where: str | None = None) -> DataError:
    """Return what is wrong with a .json file; ``where``: the row, for errors that do not know their place."""
    if not isinstance(error, json.JSONDecodeError):
        return DataError(f"{where or file.name}: {_reason(error)}")
    hint = _hint(error).replace("; one row a line, nothing after it", "; a .json file is one value: one row a line is .jsonl")
    if error.pos >= len(error.doc.rstrip(BLANKS)) or error.msg.startswith("Unterminated string"):
        hint = "; the file ends too early: it was cut off. Get the whole file"
    return DataError(f"{file.name} line {error.lineno}: not JSON ({error.msg} at column {error.colno}){hint}")


def _hint(error: json.JSONDecodeError) -> str:
    seen = error.doc[error.pos : error.pos + 1]
    if seen == "'":
        return "; strings stand in double quotes"
    if seen == "\ufeff":
        return "; a byte order mark in the middle: files were joined. Remove it"
    return next((hint for start, hint in JSON_HINTS.items() if error.msg.startswith(start)), "")


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, _Refused):
        return str(error)
    if isinstance(error, RecursionError):
        return "not JSON that can be read: brackets are nested too deeply; flatten it"
    return "a number of thousands of digits; write it as text in quotes"  # Python's limit: sys.get_int_max_str_digits()
