"""Data files in every state that users have them in: read, or refused with the file and the line."""

import json

import pytest

from qlite.data.dataset import Data
from qlite.data.encode import Encoder
from qlite.data.formats import detect_format, to_messages
from qlite.data.rows import Row, read_rows
from qlite.errors import DataError
from tests.tiny_tokenizer import tiny_tokenizer

GOOD = {"prompt": "a", "completion": "b"}


def test_jsonl_and_json_give_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({**GOOD, "n": n}) for n in range(3)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps([{**GOOD, "n": n} for n in range(3)]))
    lines, whole = read_rows(str(tmp_path / "a.jsonl")), read_rows(str(tmp_path / "a.json"))
    assert [r.fields for r in lines] == [r.fields for r in whole]
    assert lines[1].where == "a.jsonl line 2"
    assert whole[1].where == "a.json row 2"


def test_a_byte_order_mark_windows_line_ends_and_u2028_are_no_trouble(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"prompt": "a\u2028b", "completion": "c"}
    path.write_bytes(b"\xef\xbb\xbf" + (json.dumps(row, ensure_ascii=False) + "\r\n").encode() * 2)
    assert [r.fields for r in read_rows(str(path))] == [row, row]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "a"', "a.jsonl line 1: not JSON"),
        ("a.jsonl", b"{}\n[1]\n", "a.jsonl line 2: a row is an object"),
        ("a.jsonl", b"\xff\xfe", "a.jsonl byte 0: not UTF-8"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.json", b"{}", "one list of rows"),
        ("a.json", b"[3]", "a.json row 1"),
        ("a.json", b"[" * 100_000, "a.json: not JSON"),
        ("a.parquet", b"", "is not a .jsonl or .json file"),
    ],
)
def test_malformed_files_are_named_with_their_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(str(tmp_path / name))
    assert words in str(error.value)


def test_a_missing_file_is_said_with_the_folder_looked_in(tmp_path):
    with pytest.raises(DataError, match=r'data.train: cannot read "nothing.jsonl"'):
        read_rows("nothing.jsonl")


@pytest.mark.parametrize(
    ("fields", "name", "prompt", "answer"),
    [
        ({"prompt": "p", "completion": "c"}, "prompt", "p", "c"),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", "i", "o"),
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca", "i\n\n### Input:\nx", "o"),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, "messages", "u", "a"),
    ],
)
def test_formats_are_found_by_their_fields(fields, name, prompt, answer):
    row = Row(fields, "here")
    assert detect_format(row) == name
    messages = to_messages(row, name)
    assert [m["content"] for m in messages] == [prompt, answer]


@pytest.mark.parametrize(
    ("fields", "format", "words"),
    [
        ({"question": "q"}, None, "fields 'question' fit no format"),
        ({"prompt": "p"}, "prompt", 'no field "completion"'),
        ({"prompt": "p", "completion": 3}, "prompt", "a assistant turn is a int, not text"),
        ({"messages": []}, "messages", "no answer"),
        ({"messages": [{"role": "user"}]}, "messages", "KeyError"),
        ({"messages": "text"}, "messages", "TypeError"),
        ({"messages": [{"role": "user", "content": "u"}]}, "messages", "no answer to learn"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(fields, format, words):
    row = Row(fields, "a.jsonl line 7")
    with pytest.raises(DataError) as error:
        to_messages(row, format) if format else detect_format(row)
    assert str(error.value).startswith("a.jsonl line 7: ")
    assert words in str(error.value)


def data_file(tmp_path, lengths: list[int]) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", "completion": "c" * n}) + "\n" for n in lengths))
    return str(path)


def test_rows_that_are_too_long_are_left_out_and_counted(tmp_path):
    notes = []
    data = Data(train=data_file(tmp_path, [1, 200, 2, 300])).load(tiny_tokenizer(), 60, notes.append)
    assert len(data.train) == 2
    assert "2 of 4 rows are longer than train.tokens = 60" in notes[0]


def test_rows_with_an_empty_answer_are_left_out_and_counted(tmp_path):
    # 28 rows of the classic Alpaca set are so.
    notes = []
    data = Data(train=data_file(tmp_path, [1, 0, 2, 0])).load(tiny_tokenizer(), 60, notes.append)
    assert len(data.train) == 2
    assert "2 of 4 rows have an empty answer and are left out, first rows.jsonl line 2" in notes[0]


def test_the_alpaca_prompts_are_the_originals_word_for_word():
    encoder = Encoder(tiny_tokenizer("alpaca"))
    row = {"instruction": "Add.", "input": "1 1", "output": "2"}
    wanted = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n"
    )
    short = wanted.replace(", paired with an input that provides further context", "").replace("### Input:\n1 1\n\n", "")
    for fields, prompt in ((row, wanted), ({**row, "input": ""}, short)):
        assert encoder.tokenizer.decode(encoder.encode_prompt(to_messages(Row(fields, ""), "alpaca")[:-1])) == prompt


def test_held_out_rows_come_off_the_end(tmp_path):
    data = Data(train=data_file(tmp_path, [1, 2, 3, 4, 5]), held_out_rows=2).load(tiny_tokenizer(), 100, lambda _: None)
    assert len(data.train) == 3
    assert [m[-1]["content"] for m in data.test_messages] == ["cccc", "ccccc"]


def test_nothing_short_enough_and_too_much_held_out_are_errors(tmp_path):
    source = data_file(tmp_path, [200, 300])
    with pytest.raises(DataError, match="train.tokens = 60: .* has no row with an answer that is that short"):
        Data(train=source).load(tiny_tokenizer(), 60, lambda _: None)
    with pytest.raises(DataError, match="data.held_out_rows = 2: .* has only 2 rows"):
        Data(train=source, held_out_rows=2).load(tiny_tokenizer(), 600, lambda _: None)


def test_raw_text_is_cut_into_pieces_that_lose_nothing(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "x" * 25}))
    data = Data(train=str(path)).load(tiny_tokenizer(), 10, lambda _: None)
    assert [len(row) for row in data.train] == [10, 10, 6]


@pytest.mark.parametrize(("systems", "common"), [(["s", "s"], "s"), (["s", "t"], ""), (["s", None], "")])
def test_a_system_message_that_all_rows_share_is_remembered(tmp_path, systems, common):
    path = tmp_path / "m.jsonl"
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": [{"role": "system", "content": s}, *turns] if s else turns} for s in systems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Data(train=str(path)).load(tiny_tokenizer(), 200, lambda _: None).system == common


def test_a_hub_data_set_goes_through_datasets(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([GOOD, GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("org/name", "validation")
    assert asked == [("org/name", "validation")]
    assert [r.fields for r in rows] == [GOOD, GOOD]


def test_a_hub_data_set_that_cannot_be_had_is_one_line():
    with pytest.raises(DataError, match='cannot load data set "org/nothing"') as error:
        read_rows("org/nothing")
    assert "\n" not in str(error.value)
