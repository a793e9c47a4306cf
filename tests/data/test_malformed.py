"""Data files with every fault that users' files have: refused in one line with file, line or row, and the fix."""

import gzip
import io
import json
import random
import re
import zipfile
from pathlib import Path

import pytest

from qlite.data import blocks, find, rows, tables
from tests.data.data_files import GOOD, lines_of, parquet_bytes, read, read_or_refusal, refusal, shared, written


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


@pytest.mark.parametrize(("name", "content", "words"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_files_are_named_with_their_place_and_the_fix(tmp_path, name, content, words):
    assert words in refusal(written(tmp_path / name, content))


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


SUITE = "json_test_suite/test_parsing"


def test_the_json_test_suite_is_whole():
    assert {sort: len(list(shared(SUITE).glob(f"{sort}_*.json"))) for sort in "yni"} == {"y": 95, "n": 188, "i": 35}


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_nothing_that_is_not_json_is_read_as_a_row_or_as_a_value(tmp_path, ending):
    refused = 0
    for file in sorted(shared(SUITE).glob("n_*.json")):
        content = file.read_bytes()
        before, after = (b"[", b"]") if ending == "json" else (b"", b"")
        for text in (content, before + b'{"value": ' + content + b"}" + after):
            refusal(written(tmp_path / f"a.{ending}", text))
            refused += 1
    assert refused == 2 * 188


def test_all_that_is_json_is_read_as_a_value_but_for_keys_that_stand_twice(tmp_path):
    twice = []
    for file in sorted(shared(SUITE).glob("y_*.json")):
        content = file.read_bytes()
        found = read_or_refusal(written(tmp_path / "a.json", b'[{"value": ' + content + b"}]"))
        if "stands twice" in found:
            twice.append(file.name)
        else:
            assert [row.fields for row in found] == [{"value": json.loads(content)}]
    assert twice == ["y_object_duplicated_key.json", "y_object_duplicated_key_and_value.json"]


def test_of_all_that_is_json_only_objects_are_rows(tmp_path):
    objects = 0
    for file in sorted(shared(SUITE).glob("y_*.json")):
        content = file.read_bytes()
        is_object = isinstance(json.loads(content), dict) and "duplicated" not in file.name
        found = read_or_refusal(written(tmp_path / "a.jsonl", content.replace(b"\n", b" ")))
        assert isinstance(found, list) == is_object, file.name
        objects += is_object
    assert objects == 10


def test_what_json_leaves_open_is_read_or_refused_and_stays_so(tmp_path):
    read_as_values = []
    for file in sorted(shared(SUITE).glob("i_*.json")):
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
        if isinstance(read_or_refusal(written(tmp_path / "a.json", b'[{"value": ' + content + b"}]")), list):
            read_as_values.append(file.stem)
    assert read_as_values == [
        "i_number_double_huge_neg_exp",
        "i_number_real_underflow",
        "i_number_too_big_neg_int",
        "i_number_too_big_pos_int",
        "i_number_very_big_negative_int",
        "i_structure_500_nested_arrays",
        "i_structure_UTF-8_BOM_empty_object",
    ]


def test_a_real_file_that_is_not_utf8_is_named_with_line_and_byte():
    path = shared("snips_nlu/train_PlayMusic_full.json")
    content = path.read_bytes()
    assert content[150_732] == 0xED
    line = content[:150_732].count(b"\n") + 1
    assert refusal(path).startswith(f"train_PlayMusic_full.json line {line}, byte 150732: not UTF-8 (0xED)")
