"""Data sets of the hub: read by the real library out of a folder that is laid out as the hub has it, or by a stand-in."""

import re

import pytest

from qlite.data.hub import HubData, hub_commit, hub_rows
from qlite.data.sources import Source, fingerprint, read_rows, source_bytes, source_files
from qlite.errors import DataError
from tests.data.data_files import GOOD, lines_of, refusal, written


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set in the layout of the hub, which the library itself finds in the working folder; ``hub_rows`` cannot tell."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    written(tmp_path / "org/name/train.jsonl", lines_of(*[{"n": n} for n in range(20)]))
    written(tmp_path / "org/name/test.jsonl", lines_of({"n": 100}))
    return lambda split="train", name=None, stream=False: HubData("org/name", name, split, None, stream)


@pytest.mark.parametrize(
    ("split", "stream", "wanted"),
    [
        ("train", False, range(20)),
        ("train", True, range(20)),
        ("train[:25%]", False, range(5)),
        ("train[18:]", False, range(18, 20)),
        ("test", False, [100]),
        ("test", True, [100]),
    ],
)
def test_a_split_or_a_slice_is_read_at_once_or_as_a_stream(hub, split, stream, wanted):
    found = list(hub_rows(hub(split, stream=stream)))
    assert [row.fields for row in found] == [{"n": n} for n in wanted]
    assert found[0].where == "org/name row 1"
    assert [row.number for row in found] == list(range(1, len(found) + 1))


@pytest.mark.parametrize(
    ("split", "name", "stream", "words"),
    [
        ("tset", None, False, 'split = "tset": "org/name" has no such split; it has "train", "test"; did you mean "test"?'),
        ("tset", None, True, 'split = "tset": "org/name" has no such split; it has "train", "test"; did you mean "test"?'),
        ("val[:5%]", None, False, 'split = "val": "org/name" has no such split; it has "train", "test"'),
        ("train[:5", None, False, 'split = "train[:5": is no split or slice; write for example'),
        ("train[:5%]", None, True, "a slice cannot be streamed; give rows = N for the first N, or remove stream"),
        ("train", "french", False, 'name = "french": "org/name" has no such configuration; it has "default"'),
    ],
)
def test_what_a_hub_data_set_has_not_is_said_with_what_it_has(hub, split, name, stream, words):
    with pytest.raises(DataError, match=re.escape(words)):
        list(hub_rows(hub(split, name, stream)))


def test_a_configuration_must_be_chosen_where_there_are_several(hub, tmp_path):
    written(tmp_path / "org/name/fr.jsonl", lines_of({"n": 7}))
    configurations = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("fr", "test"))
    written(tmp_path / "org/name/README.md", f"---\nconfigs:\n{configurations}---\n")
    with pytest.raises(DataError, match='has no such configuration; it has "fr", "test"'):
        list(hub_rows(hub()))
    assert [row.fields["n"] for row in hub_rows(hub(name="fr"))] == [7]


def test_rows_of_the_hub_go_through_the_source_and_its_fingerprint_through_the_commit(monkeypatch):
    import datasets

    asked = []

    class Builder:
        name, hash = "json", "c0ffee"

        def download_and_prepare(self):
            asked.append("download")

        def as_dataset(self, split):
            asked.append(split)
            return datasets.Dataset.from_list([GOOD] * 5 if split == "train" else [])

    def load(path, name, revision):
        asked.append((path, name, revision))
        return Builder()

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    source = Source(path="org/name", name="fr", revision="v2", rows=3)
    found = list(read_rows(source, "data.train"))
    assert [row.where for row in found] == ["org/name row 1", "org/name row 2", "org/name row 3"]
    assert asked == [("org/name", "fr", "v2"), "download", "train"]
    assert source_files(source, "k") == []
    assert source_bytes(source, "k") == 0
    with pytest.raises(DataError, match='data.test: "org/name" has no rows in split "test"; give another split'):
        list(read_rows(Source(path="org/name", split="test"), "data.test"))
    same = fingerprint(Source(path="org/name", name="fr", revision="c0ffee", split="train", stream=True, rows=3), "k")
    assert fingerprint(source, "k") == same
    Builder.hash = "decade"
    assert (
        len(
            {
                same,
                fingerprint(source, "k"),
                fingerprint(Source(path="org/name", name="fr"), "k"),
                fingerprint(Source(path="org/name"), "k"),
            }
        )
        == 4
    )
    # Offline, the library takes any version that is in its cache.
    Builder.name = "cache"
    assert hub_commit(HubData("org/name", None, "train", "decade", False)) == "decade"
    with pytest.raises(DataError, match='revision = "v2": the hub cannot be reached, and of "org/name" this machine has only decade'):
        list(read_rows(source, "k"))


def test_a_hub_data_set_that_cannot_be_had_is_one_line_and_names_near_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("org/nothing").startswith('cannot load "org/nothing" (split "train"): Couldn\'t reach') or "hub" in refusal(
        "org/nothing"
    )
    written(tmp_path / "data/orders/a.jsonl", lines_of(GOOD))
    assert 'On this disk, did you mean "data/orders"?' in refusal("data/ordres")
    with pytest.raises(DataError, match="^data.train: "):
        fingerprint(Source(path="org/nothing"), "data.train")
