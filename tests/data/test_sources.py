"""Every kind of source, read row by row in flat memory: its rows, their places, its fingerprint, its progress."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlite.data import blocks, find, rows, tables
from qlite.data.sources import KINDS, Source, fingerprint, read_rows, source_bytes
from qlite.errors import DataError
from qlite.units import MIB
from tests.data.data_files import GOOD, lines_of, parquet_bytes, read, refusal, shared, written

A = lines_of(GOOD)


def test_all_kinds_give_the_same_rows_each_with_its_place(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    wanted = [{"prompt": f"p{n}", "completion": f"c, {n}\nnext"} for n in range(3)]
    written(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in wanted) + "\n\n")
    written(tmp_path / "a.ndjson", lines_of(*wanted))
    written(tmp_path / "a.json", json.dumps(wanted, indent=2))
    written(tmp_path / "b.json", json.dumps({"version": "1.0", "data": wanted}))
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(GOOD), delimiter=separator)
        writer.writeheader()
        writer.writerows(wanted)
        written(tmp_path / name, text.getvalue())
    parquet.write_table(pa.Table.from_pylist(wanted), tmp_path / "a.parquet")
    places = {
        "a.jsonl": ["a.jsonl line 1", "a.jsonl line 2", "a.jsonl line 3"],
        "a.ndjson": ["a.ndjson line 1", "a.ndjson line 2", "a.ndjson line 3"],
        "a.json": ["a.json row 1", "a.json row 2", "a.json row 3"],
        "b.json": ["b.json row 1", "b.json row 2", "b.json row 3"],
        # A line of names, then rows of two lines each: the place is where a row begins.
        "a.csv": ["a.csv line 2", "a.csv line 4", "a.csv line 6"],
        "a.tsv": ["a.tsv line 2", "a.tsv line 4", "a.tsv line 6"],
        "a.parquet": ["a.parquet row 1", "a.parquet row 2", "a.parquet row 3"],
    }
    for name, where in places.items():
        found = read(tmp_path / name)
        assert [row.fields for row in found] == wanted, name
        assert [row.where for row in found] == where
    assert {Path(name).suffix for name in places} == set(find.FILE_SUFFIXES) - set(find.TEXT_SUFFIXES)
    assert set(KINDS) == set(find.FILE_SUFFIXES)


def test_a_byte_order_mark_windows_line_ends_and_u2028_are_no_trouble(tmp_path):
    row = {"prompt": "a\u2028b\u0085c", "completion": "😀"}
    text = json.dumps(row, ensure_ascii=False)
    path = written(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + (text + "\r\n").encode() * 2)
    assert [(r.fields, r.number) for r in read(path)] == [(row, 1), (row, 2)]
    path = written(tmp_path / "a.json", b"\xef\xbb\xbf" + f"[{text},\r\n{text}]\r\n".encode())
    assert [r.fields for r in read(path)] == [row, row]
    path = written(tmp_path / "a.csv", '\ufeffprompt,completion\r\na\u2028b,"c\r\nd"\r\ne,f\r\n')
    assert [(r.fields, r.number) for r in read(path)] == [
        ({"prompt": "a\u2028b", "completion": "c\r\nd"}, 2),
        ({"prompt": "e", "completion": "f"}, 4),
    ]
    path = written(tmp_path / "a.txt", "\ufeffa\u2028b\r\nc\r\n")
    assert [r.fields for r in read(path)] == [{"text": "a\u2028b\nc\n"}]
    path = written(tmp_path / "mac.csv", "prompt,completion\ra,b\rc,d\r")
    assert [r.fields["prompt"] for r in read(path)] == ["a", "c"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 10_000])
def test_rows_do_not_depend_on_where_a_block_ends(tmp_path, monkeypatch, block):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    values = [{"prompt": "ä€😀" * n, "completion": "x" * (50 * n)} for n in range(6)]
    text = "\n\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    for end in ("", "\n", "\n\n", "\r\n"):
        found = read(written(tmp_path / "a.jsonl", "\ufeff" + text + end))
        assert [row.fields for row in found] == values
        assert [row.number for row in found] == [1, 3, 5, 7, 9, 11]
    pairs = read(written(tmp_path / "b.txt", "a|b\r\n\r\nä|€\nc|d|e"), separator="|")
    assert [(row.fields["prompt"], row.fields["completion"], row.number) for row in pairs] == [
        ("a", "b", 1),
        ("ä", "€", 3),
        ("c", "d|e", 4),
    ]
    table = read(written(tmp_path / "c.csv", 'p,c\nä,"1\n2"\n\nb,"x ""y"""\n'))
    assert [(list(row.fields.values()), row.number) for row in table] == [(["ä", "1\n2"], 2), (["b", 'x "y"'], 5)]


@pytest.mark.parametrize("piece", [1, 5, 16, 1000])
def test_a_text_file_comes_in_pieces_that_lose_nothing_and_know_their_line(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tables, "PIECE_CHARACTERS", piece)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", piece)
    text = "".join(f"line {n} " + "wörter " * (n % 4) + "x" * (n % 40) + "\n" for n in range(1, 60)) + "end"
    found = read(written(tmp_path / "a.txt", text))
    joined = "".join(row.fields["text"] for row in found)
    # Pieces of nothing but blanks are left out; they come about only where pieces are as short as here.
    assert "".join(joined.split()) == "".join(text.split())
    for row in found:
        line = text.split("\n")[row.number - 1]
        first = row.fields["text"].split("\n")[0]
        assert first in line
        assert row.where == f"a.txt line {row.number}"
    assert [row.goes_on for row in found] == [True] * (len(found) - 1) + [False]
    if piece == 1000:
        assert joined == text
        assert all(row.fields["text"].endswith("\n") for row in found[:-1])


def test_lines_of_a_text_file_are_cut_at_the_first_separator(tmp_path):
    path = written(tmp_path / "a.txt", "p 1||c 1 \n\n  \np|2||c||2\n")
    assert [row.fields for row in read(path, separator="||")] == [
        {"prompt": "p 1", "completion": "c 1"},
        {"prompt": "p|2", "completion": "c||2"},
    ]
    path = written(tmp_path / "b.txt", "a||b\nc|d\n")
    assert refusal(path, separator="||").startswith('b.txt line 2: has no separator "||" between prompt and completion: c|d')
    md = written(tmp_path / "c.md", "a||b\n")
    assert read(md, separator="||")[0].fields == {"text": "a||b\n"}


def test_so_many_rows_are_read_as_are_asked_for_over_all_files(tmp_path):
    written(tmp_path / "a.jsonl", lines_of(*[{"n": n} for n in range(3)]))
    written(tmp_path / "b.jsonl", lines_of(*[{"n": n} for n in range(3, 6)]) + "broken")
    assert [row.fields["n"] for row in read(tmp_path, rows=5)] == [0, 1, 2, 3, 4]
    assert [row.fields["n"] for row in read(tmp_path, rows=2)] == [0, 1]
    assert "b.jsonl line 4" in refusal(tmp_path, rows=7)


def test_an_object_with_one_list_of_objects_is_its_rows_and_a_conversation_is_not(tmp_path):
    path = written(tmp_path / "a.json", json.dumps({"PlayMusic": [GOOD, GOOD], "names": ["x"], "empty": [], "n": 3}))
    assert [row.fields for row in read(path)] == [GOOD, GOOD]
    for value, words in [
        ({"train": [GOOD], "test": [GOOD]}, 'this object has 2 lists of objects (its keys: "train", "test")'),
        ({"data": []}, "has 0 lists of objects"),
        ({"messages": [{"role": "user", "content": "u"}]}, 'a single conversation (key "messages"): write [ before and ] after it'),
        (GOOD, "has 0 lists of objects"),
        ({}, "no keys"),
        ("text", "this one is text"),
        (None, "this one is null"),
        (True, "this one is true or false"),
        (3, "this one is a number"),
    ]:
        assert words in refusal(written(tmp_path / "b.json", json.dumps(value)))


def test_parquet_rows_are_counted_over_batches_and_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_ROWS_IN_A_BATCH", 7)
    values = [{"messages": [{"role": "user", "content": f"ä{n}"}], "score": n / 2, "none": None} for n in range(40)]
    path = written(tmp_path / "a.parquet", parquet_bytes(values, row_group_size=11))
    found = read(path)
    assert [row.fields for row in found] == values
    assert [row.number for row in found] == list(range(1, 41))


def test_a_fingerprint_follows_content_names_and_what_chooses_rows_but_not_the_folder_or_the_date(tmp_path):
    for folder in ("one", "two"):
        written(tmp_path / folder / "a.jsonl", A)
        written(tmp_path / folder / "b/c.txt", "x|y\n")
    os.utime(tmp_path / "two/a.jsonl", (1, 1))
    plain = fingerprint(Source(path=str(tmp_path / "one")), "k")
    assert re.fullmatch("[0-9a-f]{64}", plain)
    assert fingerprint(Source(path=str(tmp_path / "two")), "other") == plain
    assert fingerprint(Source(path=str(tmp_path / "one"), weight=3.0, split="train", revision="x", stream=True), "k") == plain
    changed = {
        fingerprint(Source(path=str(tmp_path / "one"), rows=5), "k"),
        fingerprint(Source(path=str(tmp_path / "one"), rows=6), "k"),
        fingerprint(Source(path=str(tmp_path / "one"), separator="|"), "k"),
        fingerprint(Source(path=str(tmp_path / "one/a.jsonl")), "k"),
    }
    assert fingerprint(Source(path=str(tmp_path / "one/a.jsonl"), separator="|"), "k") in changed  # no .txt: it changes nothing
    written(tmp_path / "two/a.jsonl", A * 2)
    changed.add(fingerprint(Source(path=str(tmp_path / "two")), "k"))
    written(tmp_path / "two/a.jsonl", A).rename(tmp_path / "two/d.jsonl")
    changed.add(fingerprint(Source(path=str(tmp_path / "two")), "k"))
    assert len(changed - {plain}) == 6


def test_progress_rises_to_the_size_of_all_files(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    monkeypatch.setattr(rows, "MIB", 100)
    monkeypatch.setattr(tables, "MOST_ROWS_IN_A_BATCH", 10)
    values = [{"n": n} for n in range(50)]
    written(tmp_path / "a.jsonl", lines_of(*values))
    written(tmp_path / "b.json", json.dumps(values))
    written(tmp_path / "c.csv", "n\n" + "".join(f"{n}\n" for n in range(50)))
    written(tmp_path / "d.parquet", parquet_bytes(values))
    written(tmp_path / "e.txt", "text\n" * 100)
    told: list[int] = []
    source = Source(path=str(tmp_path))
    assert len(list(read_rows(source, "k", told=told.append))) > 200
    assert told == sorted(told)
    assert len(told) > 20
    assert told[-1] == source_bytes(source, "k") == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_files_are_looked_for_at_once_and_read_row_by_row(tmp_path):
    with pytest.raises(DataError, match="data.test: there is no"):
        read_rows(Source(path=str(tmp_path / "a.jsonl")), "data.test")
    path = written(tmp_path / "a.jsonl", A + "broken\n")
    found = read_rows(Source(path=str(path)), "data.test")
    assert next(found).fields == GOOD
    with pytest.raises(DataError, match="^data.test: a.jsonl line 2: not JSON"):
        next(found)


PEAK = """
import resource, sys
from qlite.data.sources import Source, read_rows
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
rows = read_rows(Source(path=sys.argv[1]), "k")
for count, row in enumerate(rows, start=1):
    if count == 5:
        first = peak()
print(count, peak() - first)
"""


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt"])
def test_memory_stays_flat_over_a_file_of_many_times_its_blocks(tmp_path, kind):
    texts = [f"{n} " * 80 for n in range(60_000)]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        path.write_bytes(
            parquet_bytes([{"p": text} for text in texts], row_group_size=len(texts), compression="none", use_dictionary=False)
        )
    elif kind == "jsonl":
        path.write_text(lines_of(*({"p": text} for text in texts)))
    else:
        path.write_text("p\n" * (kind == "csv") + "\n".join(texts))
    size = path.stat().st_size
    assert size > 27e6
    run = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True, timeout=120)
    count, growth = map(int, run.stdout.split())
    assert count == len(texts) if kind != "txt" else size // MIB <= count <= size // MIB + 2
    assert growth < 12 * MIB


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("alpaca_seed_tasks/seed_tasks.jsonl", {}, 175),
        ("llms_from_scratch_instruct/instruction-data.json", {}, 1100),
        ("e2e_nlg/cleaned-devel-fixed.no-ol.csv", {}, 4299),
        ("e2e_nlg/cleaned-test-fixed.csv", {}, 4693),
        ("e2e_nlg/lora-paper-valid.txt", {"separator": "||"}, 4672),
        ("e2e_nlg/lora-paper-test.txt", {"separator": "||"}, 4693),
        ("sgd_dialogues/*.json", {}, 452),
        ("snips_nlu/validate_*.json", {}, 700),
    ],
)
def test_real_data_sets_have_the_rows_that_their_descriptions_say(name, settings, count):
    assert len(read(shared(name), **settings)) == count
