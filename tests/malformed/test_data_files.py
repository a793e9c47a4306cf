"""Data files with every fault that users' files have: refused in one line with file, line or row, and the fix."""

import gzip
import io
import json
import os
import random
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from qlite.data import blocks, find, rows, tables
from qlite.units import GIB
from tests.data.data_files import GOOD, lines_of, parquet_bytes, read, read_or_refusal, refusal, shared, written
from tests.data.test_dataset import load
from tests.data.test_formats import BAD_ROWS
from tests.malformed import Case, count_refused


def zipped(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "x")
    return content.getvalue()


A = lines_of(GOOD)
MALFORMED = [
    # Encodings
    (
        "a.jsonl",
        b'{"a": 1}\n{"a": "caf\xe9"}\n',
        "a.jsonl line 2, byte 19: not UTF-8 (0xE9); convert the file, for example from Latin-1: iconv",
    ),
    ("a.csv", b"p,c\n\na,\xff\n", "a.csv line 3, byte 7: not UTF-8 (0xFF)"),
    ("a.json", b'[{"a":\n"\xff"}]', "a.json line 2, byte 8: not UTF-8"),
    ("a.txt", b"abc\n" * 400_000 + b"\xc3(", "a.txt line 400001, byte 1600000: not UTF-8 (0xC3)"),
    ("a.txt", b"a\xe2\x82", "a.txt line 1, byte 1: the file ends inside a character: it was cut off"),
    ("a.jsonl", A.encode("utf-16"), "a.jsonl: is UTF-16 text; save it as UTF-8: iconv -f utf-16 -t utf-8"),
    ("a.jsonl", b"\xfe\xff" + A.encode("utf-16-be"), "a.jsonl: is UTF-16 text"),
    ("a.jsonl", A.encode("utf-16-le"), "a.jsonl: is UTF-16 text; save it as UTF-8: iconv -f utf-16le"),
    ("a.txt", "plain text".encode("utf-16-be"), "a.txt: is UTF-16 text; save it as UTF-8: iconv -f utf-16be"),
    ("a.csv", A.encode("utf-32"), "a.csv: is UTF-32 text"),
    ("a.jsonl", A.encode() + b'{"a": "\0"}\n', f"a.jsonl line 2, byte {len(A) + 7}: a NUL byte"),
    ("a.txt", b"text\n\0\0\0\0\0\0", "a.txt line 2, byte 5: a NUL byte"),
    # Other contents under a wrong name
    ("a.jsonl", gzip.compress(A.encode()), "a.jsonl: is gzip-compressed; unpack it with gunzip"),
    ("a.jsonl.gz", gzip.compress(A.encode()), "a.jsonl.gz: is gzip-compressed; unpack it with gunzip"),
    ("a.csv", zipped("a.csv"), "a.csv: is a zip archive; unpack it"),
    ("a.csv", zipped("xl/workbook.xml"), "a.csv: is an Excel workbook or other Office document; save it as CSV, UTF-8"),
    ("a.xlsx", zipped("[Content_Types].xml"), "a.xlsx: is an Excel workbook"),
    ("a.jsonl", b"PAR1\x15\x04\x15\xff", "a.jsonl: is Parquet; give it the ending .parquet"),
    ("a.txt", b"%PDF-1.4\n\xe2\xe3\xcf\xd3", "a.txt: is a PDF document"),
    ("a.log", b"text", "a.log: is of no kind that is read; rename it to what it is: .jsonl, "),
    ("a.parquet", A, "a.parquet: is JSON and not Parquet; give it the ending .jsonl"),
    ("a.parquet", b"", "a.parquet: is empty (0 bytes)"),
    ("a.parquet", b"prompt,completion\n", "a.parquet: is not Parquet (it does not begin with PAR1)"),
    ("a.parquet", gzip.compress(b"x"), "a.parquet: is gzip-compressed"),
    ("a.parquet", b"PAR1 and nothing behind it", "a.parquet: damaged Parquet ("),
    # Nothing
    ("a.jsonl", b"", "a.jsonl: holds nothing (0 bytes); fill or remove it"),
    ("a.jsonl", b"\n \r\n\t\n", "a.jsonl: holds only blank lines"),
    ("a.jsonl", b"\xef\xbb\xbf", "a.jsonl: holds only blank lines"),
    ("a.json", b"[ ]", "a.json: holds only an empty list"),
    ("a.json", b" \n", "a.json: holds only an empty list"),
    ("a.json", b"", "a.json: holds nothing (0 bytes)"),
    ("a.csv", b"prompt,completion\n", "a.csv: holds only the names of fields"),
    ("a.csv", b"", "a.csv: holds nothing (0 bytes)"),
    ("a.csv", b"\n\n", "a.csv: holds only the names of fields"),
    ("a.txt", b"\n  \n", "a.txt: holds only blank lines"),
    ("a.md", b"", "a.md: holds nothing (0 bytes)"),
    # JSON
    (
        "a.jsonl",
        A + '{"a": "b',
        "a.jsonl line 2: not JSON (Unterminated string starting at at column 7); the file ends inside this row: it was cut off",
    ),
    ("a.jsonl", A + '{"a": 1', "line 2: not JSON (Expecting ',' delimiter at column 8); the file ends inside this row"),
    (
        "a.jsonl",
        '{\n"a": 1\n}\n',
        "line 1: not JSON (Expecting property name enclosed in double quotes at column 2); a row stands on one line",
    ),
    ("a.jsonl", '[\n{"a": 1}\n]\n', "line 1: not JSON (Expecting value at column 2); a row stands on one line"),
    (
        "a.jsonl",
        A + '{"a": 1,}\n',
        "line 2: not JSON (Expecting property name enclosed in double quotes at column 9); keys stand in double quotes",
    ),
    (
        "a.jsonl",
        "{'a': 1}\n",
        "line 1: not JSON (Expecting property name enclosed in double quotes at column 2); strings stand in double quotes",
    ),
    ("a.jsonl", '{"a": 1} {"a": 2}\n', "line 1: not JSON (Extra data at column 10); one row a line"),
    ("a.jsonl", '{"a": 1}\r{"a": 2}\r', "line 1: not JSON (Extra data at column 10); one row a line"),
    ("a.jsonl", '{"a": "x\ty"}\n', "line 1: not JSON (Invalid control character at at column 9); inside a string"),
    ("a.jsonl", '{"a": "C:\\dir"}\n', "line 1: not JSON (Invalid \\escape at column 10); a backslash is written \\\\"),
    ("a.jsonl", A + "\ufeff" + A, "line 2: not JSON (Expecting value at column 1); a byte order mark in the middle: files were joined"),
    ("a.jsonl", A + '\x0b{"a": 1}\n', "line 2: not JSON (Expecting value"),
    ("a.jsonl", '{"a": NaN}\n', "a.jsonl line 1: not JSON (NaN is no JSON number); write null"),
    ("a.jsonl", '{"a": [-Infinity]}\n', "a.jsonl line 1: not JSON (-Infinity is no JSON number)"),
    ("a.jsonl", '{"a": 1e999}\n', "a.jsonl line 1: the number 1e999 is too large for a 64-bit float"),
    ("a.jsonl", A + '{"a": 1, "b": {"c": 1, "c": 1}}\n', 'a.jsonl line 2: the key "c" stands twice in one object'),
    ("a.jsonl", '{"\\u001b": 1, "\\u001b": 1}\n', 'line 1: the key "\\x1b" stands twice'),
    ("a.jsonl", f'{{"a": {"9" * 5000}}}\n', "a.jsonl line 1: a number of thousands of digits; write it as text"),
    ("a.jsonl", f'{{"a": {"[" * 100_000}{"]" * 100_000}}}\n', "a.jsonl line 1: not JSON that can be read: brackets are nested too deeply"),
    (
        "a.jsonl",
        '{"a": "\\ud800"}\n',
        "a.jsonl line 1: \\ud800 is half a character (a lone surrogate), which no tokenizer takes; remove it",
    ),
    ("a.jsonl", '{"\\uDC00": 1}\n', "a.jsonl line 1: \\udc00 is half a character"),
    ("a.jsonl", "{}\n[1]\n", 'a.jsonl line 2: a row is an object like {"prompt": ..., "completion": ...}, this one is a list'),
    ("a.jsonl", "null\n", 'line 1: a row is an object like {"prompt": ..., "completion": ...}, this one is null'),
    ("a.jsonl", '"text"\n', "this one is text"),
    ("a.jsonl", "3\n", "this one is a number"),
    ("a.jsonl", "true\n", "this one is true or false"),
    ("a.json", b"[3]", "a.json row 1: a row is an object"),
    ("a.json", b'[{}, {"a": 1},\n3.5]', 'a.json row 3: a row is an object like {"prompt": ..., "completion": ...}, this one is a number'),
    ("a.json", b"[" * 100_000, "a.json row 1, line 1: not JSON that can be read: brackets are nested too deeply"),
    ("a.json", b'{"a": ' * 100_000, "a.json: not JSON that can be read: brackets are nested too deeply"),
    ("a.json", b'[{"a": 1},\n {"a": NaN}]', "a.json row 2, line 2: not JSON (NaN is no JSON number)"),
    ("a.json", b'[{"a": 1},\n {"a": 1, "a": 2}]', 'a.json row 2, line 2: the key "a" stands twice'),
    ("a.json", b'{"data": [{"a": 1, "a": 2}]}', 'a.json: the key "a" stands twice'),
    ("a.json", b'{"data": [{"a": "\\ud800"}]}', "a.json row 1: \\ud800 is half a character"),
    ("a.json", b'[{"a": 1},\n {"a": 2},\n]', "a.json line 3: not JSON (Expecting value at column 1)"),
    ("a.json", b'[{"a": 1}\n {"a": 2}]', "a.json line 2: not JSON (Expecting ',' delimiter at column 2)"),
    (
        "a.json",
        b'[{"a": 1},\n {"a": "2',
        "a.json line 2: not JSON (Unterminated string starting at at column 8); the file ends too early: it was cut off",
    ),
    ("a.json", b'[{"a": 1},\n', "the file ends too early: it was cut off"),
    ("a.json", b'[{"a": 1}', "the file ends too early: it was cut off"),
    ("a.json", b"[", "the file ends too early: it was cut off"),
    ("a.json", b'{"data": [{"a": 1}', "the file ends too early: it was cut off"),
    ("a.json", A + A, "a.json line 2: not JSON (Extra data at column 1); a .json file is one value: one row a line is .jsonl"),
    ("a.json", b"[{}] x", "a.json line 1: not JSON (Extra data at column 6)"),
    # Tables
    ("a.csv", "p,c\na,b\n\na,b,c\n", "a.csv line 4: 3 values, and the first row names 2 fields (p, c); a value with a separator in it"),
    ("a.csv", "p,c\na\n", "a.csv line 2: 1 values, and the first row names 2 fields"),
    ("a.csv", 'p,c\na,"b\nc\n', "a.csv line 2: a double quote opens here that is not closed"),
    ("a.csv", 'p,c\na,"b"c\n', "a.csv line 2: text after a closing double quote"),
    ("a.csv", "p,c,p\na,b,c\n", 'a.csv line 1: two fields are called "p"; rename one'),
    ("a.csv", "p;c\na;b\n", 'a.csv line 1: one field only, called "p;c": the separator of a .csv file is a comma'),
    ("a.tsv", "p,c\na,b\n", "of a .tsv file a tab"),
]


def file(name: str, content: bytes | str) -> Callable[[Path], Callable[[], object]]:
    return lambda folder: partial(read, written(folder / name, content))


def made(name: str, make: Callable[[Path], object]) -> Callable[[Path], Callable[[], object]]:
    """Return what makes something else than a file under ``name``."""

    def give(folder: Path) -> Callable[[], object]:
        make(folder / name)
        return partial(read, folder / name)

    return give


def large(name: str, size: int) -> Callable[[Path], Callable[[], object]]:
    """Return what makes a file of ``size`` bytes, all of them NUL, that takes no room on the disk."""

    def make(path: Path) -> None:
        with path.open("wb") as stream:
            stream.truncate(size)

    return made(name, make)


def named(path: str) -> Callable[[Path], Callable[[], object]]:
    return lambda folder: partial(read, path.replace("HERE", str(folder)))


PLACES = {
    "a pipe": (made("a.jsonl", os.mkfifo), "a.jsonl: is a named pipe, and only regular files are read"),
    "a pipe in a folder": (
        lambda folder: (os.mkfifo(folder / "a.csv"), partial(read, folder))[1],
        "a.csv: is a named pipe, and only regular files are read",
    ),
    "a device without an end": (made("a.txt", lambda path: path.symlink_to("/dev/zero")), "a.txt: is a device"),
    "a device of its own name": (named("/dev/zero"), "is a device"),
    "a folder called like a file": (made("a.jsonl", Path.mkdir), "holds no file"),
    "a link to itself": (made("a.jsonl", lambda path: path.symlink_to(path)), "Too many levels of symbolic links"),
    "a link to nothing": (made("a.jsonl", lambda path: path.symlink_to("gone")), "which is a link to gone (No such file or directory)"),
    "a folder in itself": (made("a", lambda path: (path.mkdir(), (path / "b").symlink_to(path))), "leads back to a folder that it lies in"),
    "no such file": (named("HERE/a.jsonl"), "there is no"),
    "no such folder": (named("HERE/b/a.jsonl"), "there is no folder"),
    "a pattern that matches nothing": (named("HERE/*.jsonl"), "no file is called like"),
    "a home of nobody": (named("~nobody-of-that-name/a.jsonl"), 'there is no "~nobody-of-that-name/a.jsonl"'),
    "a name of 5,000 characters": (named("a" * 5000 + ".jsonl"), "there is no"),
    "NUL in a name": (named("a\0b.jsonl"), 'there is no "a\\x00b.jsonl"'),
    "escape codes in a name": (file("a\x1b[2J.jsonl", "x"), "a\\x1b[2J.jsonl line 1: not JSON"),
    "bytes that are no text in a name": (file(os.fsdecode(b"a\xff.jsonl"), "x"), "a\\udcff.jsonl line 1: not JSON"),
    "a line of a gigabyte": (large("a.jsonl", GIB), "a.jsonl line 1, byte 0: this line is longer than 64.0 MiB"),
    "a table of a gigabyte in one cell": (large("a.csv", GIB), "a.csv line 1, byte 0: this line is longer than 64.0 MiB"),
    "a list of three gigabytes": (large("a.json", 3 * GIB), "a.json: 3.00 GiB, and a .json file is read whole; make it .jsonl"),
    "a Parquet file of NUL": (large("a.parquet", 10**6), "a.parquet: is UTF-16 text"),
    "an Arrow file": (file("a.parquet", b"ARROW1\0\0"), "a.parquet: is an Arrow file; write it as Parquet"),
    "a pointer instead of the file": (
        file("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "a.parquet: is not Parquet",
    ),
    "a page instead of the file": (file("a.jsonl", "<!DOCTYPE html>\n<html>\n"), "a.jsonl line 1: not JSON"),
    "a Parquet file cut short": (file("a.parquet", parquet_bytes([GOOD] * 100)[:-20]), "a.parquet: damaged Parquet ("),
    "a Parquet file without its middle": (
        lambda folder: partial(read, written(folder / "a.parquet", (whole := parquet_bytes([GOOD] * 100))[:40] + whole[80:])),
        "a.parquet: damaged Parquet (",
    ),
}  # fmt: skip


def rows_of(*rows: dict, **keys: object) -> Callable[[Path], Callable[[], object]]:
    return lambda folder: partial(load, str(written(folder / "rows.jsonl", lines_of(*rows))), **keys)


USER, REPLY = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
LONG = {"prompt": "p", "completion": "c" * 100_000}
# What is JSON and could not be trained on.
ROWS = {
    "nobody answers": (rows_of({"messages": [USER, USER]}), "rows.jsonl line 1: the assistant says nothing in it"),
    "only empty answers": (rows_of({"prompt": "p", "completion": ""}), "no row is left to train on"),
    "only answers of blanks": (rows_of({"prompt": "p", "completion": " \n"}), "no row is left to train on"),
    "an empty answer among others": (rows_of(GOOD, {"prompt": "p", "completion": ""}), "1 of 2 rows (50 %) have no token to learn"),
    "every answer switched off": (rows_of({"messages": [USER, {**REPLY, "weight": 0}]}), "no row is left to train on"),
    "a row of 100,000 tokens": (rows_of(GOOD, LONG), "train.tokens = 200: 1 of 2 rows (50 %) of data.train are longer"),
    "nothing that is short enough": (rows_of(LONG), "train.tokens = 200: data.train has no row with an answer that is that short"),
    "two formats": (rows_of(GOOD, {"text": "t"}), "split the file, or give data.format"),
    "a field that goes missing": (rows_of(*[GOOD] * 30, {"prompt": "p"}), 'rows.jsonl line 31: no field "completion"'),
    "a field that changes its type": (rows_of(*[GOOD] * 30, {**GOOD, "completion": 3}), 'line 31: field "completion" is a number'),
    "a token of the model's own": (rows_of({"prompt": "p", "completion": "<|im_end|>"}), "rows.jsonl line 1 (<|im_end|>)"),
    "fewer rows than are held out": (rows_of(GOOD, held_out_rows=5), "data.held_out_rows = 5: there are only 1 rows in all"),
    "a column that no row has": (rows_of(GOOD, columns={"system": "sys"}), 'data.columns.system = "sys": no row has it'),
    "a role that nobody has": (rows_of({"messages": [USER, REPLY]}, roles={"user": "me"}), "nobody in the data is called so"),
    "no template for a conversation": (rows_of(GOOD, template=None), "there is no chat template to write a conversation with"),
    "windows of conversations": (rows_of(GOOD, stride=5), "data.stride = 5: only raw text is split into windows"),
    "a nested answer": (rows_of({"prompt": "p", "completion": {"a": {"b": "c"}}}), 'field "completion" is an object, not text'),
    "tools without a place": (rows_of({"messages": [USER, REPLY], "tools": [{"name": "f"}]}), "the chat template has no place for them"),
}  # fmt: skip


def cases() -> list[Case]:
    files = [Case(f"file {number} {words[:60]}", file(name, content), (words,)) for number, (name, content, words) in enumerate(MALFORMED)]
    bad = [
        Case(f"row {number} {words}", rows_of(fields, format=format or "auto"), ("rows.jsonl line 1: ", words))
        for number, (fields, format, words) in enumerate(BAD_ROWS)
        if "surrogate" not in words  # no JSON text holds one
    ]
    groups = (PLACES, ROWS)
    return [*files, *bad, *(Case(name, give, ("data.", said)) for group in groups for name, (give, said) in group.items())]


def test_every_malformed_file_and_row_is_named_with_its_place_and_the_fix(tmp_path, record_property):
    found = cases()
    assert len(found) == 150
    count_refused("data files and rows", found, tmp_path, record_property)


def test_faults_of_all_kinds_of_files_are_tried():
    assert len(MALFORMED) == 86
    assert {Path(name).suffix for name, _, _ in MALFORMED} >= set(find.FILE_SUFFIXES) - {".ndjson"}


@pytest.mark.parametrize(
    ("name", "before", "text", "line"),
    [("a.jsonl", "{}\n", '{"a": "%s"}', 3001), ("a.txt", "b\n", "%s", 3001), ("a.csv", "b\n", "a\n%s\n", 3002)],
)
def test_a_line_too_long_for_memory_is_refused_with_its_number(tmp_path, monkeypatch, name, before, text, line):
    monkeypatch.setattr(blocks, "LONGEST_LINE_BYTES", 10_000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    message = refusal(written(tmp_path / name, before * 3000 + text % ("x" * 20_000)))
    assert message.startswith(f"{name} line {line}, byte ")
    assert "this line is longer than 9.77 KiB" in message


def test_a_json_file_may_be_one_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "LONGEST_LINE_BYTES", 10_000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    values = [{"a": "x" * 900} for _ in range(30)]
    assert [row.fields for row in read(written(tmp_path / "a.json", json.dumps(values)))] == values


def test_a_json_file_too_large_to_be_held_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LARGEST_JSON_BYTES", 10)
    message = refusal(written(tmp_path / "a.json", json.dumps([GOOD])))
    assert message == "a.json: 36 B, and a .json file is read whole; make it .jsonl: jq -c '.[]' FILE > NEW"


def test_an_unclosed_quote_in_a_long_table_is_said_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST_LINE_BYTES", 5000)
    message = refusal(written(tmp_path / "a.csv", "p,c\na,b\n" + 'x,"y\n' + "a,b\n" * 5000))
    assert message.startswith("a.csv line 3: a double quote opens here that is not closed")


def test_a_long_value_of_a_table_is_read(tmp_path):
    assert read(written(tmp_path / "a.csv", "p\n" + "x" * 1_000_000 + "\n"))[0].fields == {"p": "x" * 1_000_000}


def random_escapes(draw: random.Random) -> str:
    parts = ["\\ud83d", "\\ude00", "\\uD83D", "\\uDE00", "\\\\", "\\\\ud83d", "\\n", "a", "\\u00e4", "u", "\\u0064"]
    return "".join(draw.choice(parts) for _ in range(draw.randint(1, 8)))


def test_halves_of_characters_are_found_however_they_are_escaped(tmp_path):
    draw = random.Random(1)
    wholes = 0
    for _ in range(1500):
        line = f'{{"a": ["{random_escapes(draw)}"]}}'
        value = json.loads(line)
        found = read_or_refusal(written(tmp_path / "a.jsonl", line))
        if re.search("[\ud800-\udfff]", value["a"][0]):
            assert "is half a character" in found
        else:
            assert found[0].fields == value
            wholes += 1
    assert 300 < wholes < 1200


def test_broken_files_end_in_an_error_or_in_rows_and_never_otherwise(tmp_path):
    draw = random.Random(2)
    good = {
        "a.jsonl": lines_of(*[{"prompt": "ä\u2028", "n": [n, 1.5, None]} for n in range(5)]).encode(),
        "a.json": json.dumps({"data": [{"prompt": "ä", "n": n} for n in range(5)]}, ensure_ascii=False).encode(),
        "a.csv": 'p,c\nä,"b\n""c"""\nd,e\n'.encode(),
        "a.txt": "ein Text\nmit Zeilen ä\n".encode(),
        "a.parquet": parquet_bytes([{"prompt": "ä", "n": n} for n in range(5)]),
    }
    refused = 0
    for _ in range(1500):
        name, content = draw.choice(list(good.items()))
        for _ in range(draw.randint(1, 4)):
            at, length = draw.randrange(len(content) + 1), draw.randint(0, 9)
            content = content[:at] + draw.randbytes(draw.randint(0, 2)) + content[at + length :]
        found = read_or_refusal(written(tmp_path / name, content))
        refused += isinstance(found, str)
        assert isinstance(found, str) or all(isinstance(row.fields, dict) for row in found)
    assert 400 < refused < 1450


def test_parquet_that_lies_is_refused_with_its_row(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    text = pa.array([b"ok", b"\xff\xfe", b"ok"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"prompt": text}), tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet").startswith("a.parquet row 2: a value cannot be read (")
    parquet.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "b.parquet")
    assert refusal(tmp_path / "b.parquet") == 'b.parquet: two columns are called "a"; rename one'
    parquet.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "c.parquet")
    assert refusal(tmp_path / "c.parquet") == "c.parquet: holds no rows; fill or remove it"
    written(tmp_path / "d.parquet", parquet_bytes([GOOD] * 100)[:-20])
    assert refusal(tmp_path / "d.parquet").startswith("d.parquet: damaged Parquet (")


def test_a_real_file_that_is_not_utf8_is_named_with_line_and_byte():
    path = shared("snips_nlu/train_PlayMusic_full.json")
    content = path.read_bytes()
    assert content[150_732] == 0xED
    line = content[:150_732].count(b"\n") + 1
    assert refusal(path).startswith(f"train_PlayMusic_full.json line {line}, byte 150732: not UTF-8 (0xED)")
