"""The JSON conformance files, as rows and as values of rows: what is not JSON is refused, what is JSON is read, the rest is pinned."""

import json
from functools import partial
from pathlib import Path

import pytest

from tests.data.data_files import read, read_or_refusal, refusal, shared, written
from tests.malformed import Case, count_refused

SUITE = "json_test_suite/test_parsing"


def test_the_json_test_suite_is_whole():
    assert {sort: len(list(shared(SUITE).glob(f"{sort}_*.json"))) for sort in "yni"} == {"y": 95, "n": 188, "i": 35}


def cases() -> list[Case]:
    def give(source: Path, folder: Path) -> partial:
        return partial(read, written(folder / "a.json", b'[{"value": ' + source.read_bytes() + b"}]"))

    place = r"^data\.train: a\.json(:| (row|line) \d+[:,])"
    return [Case(path.name, partial(give, path), pattern=place) for path in sorted(shared(SUITE).glob("n_*.json"))]


def test_every_value_that_is_not_json_is_refused_with_its_place(tmp_path, record_property):
    found = cases()
    assert len(found) == 188
    count_refused("JSON", found, tmp_path, record_property)


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


def test_all_that_is_json_is_read_as_a_value_but_for_keys_that_stand_twice(tmp_path, record_property):
    twice, equal = [], 0
    for file in sorted(shared(SUITE).glob("y_*.json")):
        content = file.read_bytes()
        found = read_or_refusal(written(tmp_path / "a.json", b'[{"value": ' + content + b"}]"))
        if "stands twice" in found:
            twice.append(file.name)
        else:
            assert [row.fields for row in found] == [{"value": json.loads(content)}]
            equal += 1
    assert twice == ["y_object_duplicated_key.json", "y_object_duplicated_key_and_value.json"]
    assert equal == 93
    record_property("figure", f"valid JSON: read {equal}, refused {len(twice)} in which a key stands twice")


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
