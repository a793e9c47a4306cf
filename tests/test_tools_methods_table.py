"""The table of all methods, on a tiny base: what it trains, shares and times, from any folder, and never with figures of other settings."""

import json
from pathlib import Path

import pytest
import tomli_w

from qlite.errors import RecipeError, RunError
from qlite.methods.full import Full
from tests.test_gpu_check import ROOT
from tests.tiny import CONFIG, tiny_llama
from tests.tiny_run import tiny_tables
from tests.tiny_tokenizer import VOCAB_SIZE

D, MLP, KV, LAYERS, RANK = 64, 128, 32, 2, 16
BLOCKS = LAYERS * (2 * D * D + 2 * D * KV + 3 * D * MLP + 2 * D) + D
LORA = LAYERS * RANK * (2 * (D + D) + 2 * (D + KV) + 3 * (D + MLP))


@pytest.fixture(scope="module")
def methods_table():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        import methods_table

        yield methods_table


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with a recipe whose paths are relative to it."""
    tables = tiny_tables(tmp_path, train={"accumulation": 1})
    for table, key in (("base", "model"), ("data", "train"), ("data", "test")):
        tables[table][key] = Path(tables[table][key]).name
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(tables))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(**changes: str) -> list[str]:
    options = {"recipe": "tiny.toml", "steps": "3", "rows": "3", "out": "out", **changes}
    return [word for key, value in options.items() for word in (f"--{key}", value)] + ["--only", "lora", "full"]


@pytest.mark.slow
def test_the_table_of_a_relative_recipe_has_what_is_beside_its_base_and_what_has_none(methods_table, folder):
    methods_table.main(command())
    found = {each["method"]: each for each in json.loads((folder / "out" / "methods.json").read_text())}
    assert list(found) == ["lora", "full"]
    assert found["lora"]["token"]["1"]["ratio"] > 0
    assert found["full"]["token"] == {"1": None, "16": None}
    base = BLOCKS + 2 * VOCAB_SIZE * D
    assert "bits = 4" in (folder / "out" / "lora-tiny-0.toml").read_text()
    assert [(each["trained"], each["of"]) for each in found.values()] == [(LORA, base), (base, base)]
    assert (folder / "out" / "methods.png").read_bytes().startswith(b"\x89PNG")
    rows = (folder / "out" / "methods.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| lora", "| full"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("figures.json")}
    assert len(before) == 2
    methods_table.main(command())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("figures.json")} == before


def test_a_model_that_was_trained_itself_has_no_time_beside_its_base(methods_table):
    model = tiny_llama()
    Full().attach(model)
    assert methods_table.token_time(model, 1) is None


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("storage", ["16 bit", "4 bit"])
def test_numbers_are_counted_however_they_are_packed(methods_table, storage, is_tied):
    model = tiny_llama(storage, tie_word_embeddings=is_tied)
    assert methods_table.dense_count(model) == BLOCKS + (1 if is_tied else 2) * CONFIG["vocab_size"] * D


def test_figures_of_other_settings_are_refused_before_anything_is_trained(methods_table, folder, monkeypatch):
    class Trains(Exception):
        pass

    def trains(_planned):
        raise Trains

    monkeypatch.setattr(methods_table, "one_run", trains)
    with pytest.raises(Trains):
        methods_table.main(command())
    with pytest.raises(Trains):
        methods_table.main(command(rows="4"))  # nothing was trained
    with pytest.raises(Trains):
        methods_table.main(command())
    kept = (folder / "out" / "lora-tiny-0.toml").read_text()
    for name in ("lora", "full"):
        (folder / "out" / f"{name}-tiny-0").mkdir()
    tiny = folder / "tiny.toml"
    shorter = folder / "other" / "tiny.toml"
    shorter.parent.mkdir()
    shorter.write_text(tiny.read_text().replace("tokens = 64", "tokens = 32"))
    for changes, words in (
        ({"steps": "2"}, "steps = 3, now steps = 2"),
        ({"rows": "2"}, "rows 3, now 2"),
        ({"recipe": "other/tiny.toml"}, "tokens = 64, now tokens = 32"),
    ):
        with pytest.raises(RunError, match=words) as error:
            methods_table.main(command(**changes))
        assert "choose another --out" in str(error.value)
        assert str(error.value).count("was made with") == 2
    assert (folder / "out" / "lora-tiny-0.toml").read_text() == kept


def test_figures_that_do_not_say_their_settings_are_refused(methods_table, folder):
    (folder / "out" / "full-tiny-0").mkdir(parents=True)
    (folder / "out" / "full-tiny-0" / "figures.json").write_text("{}")
    with pytest.raises(RunError, match="full-tiny-0: does not say what it was made with"):
        methods_table.main(command())


def test_questions_are_taken_from_the_whole_file_each_with_all_its_answers(methods_table, tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("".join(f"{name}||{answer}\n" for name in "abcdef" for answer in range(3)))
    found = methods_table.spread_lines(path, 3, lambda line: line.split("||")[0])
    assert found.splitlines() == [f"{name}||{answer}" for name in "ace" for answer in range(3)]
    assert methods_table.spread_lines(path, 9, lambda line: line.split("||")[0]) == path.read_text()


def test_numbers_below_1_are_refused(methods_table):
    with pytest.raises(RecipeError, match="--steps 0: should be 1 or more"):
        methods_table.main(command(steps="0"))
