"""python -m qlite.sweep: several runs from one file, shown line by line, each a folder that the other verbs take."""

from pathlib import Path

import pytest

from qlite.errors import RecipeError
from qlite.recipe.sweep import read_sweep
from qlite.recipe.write import recipe_toml
from qlite.sweep import main
from qlite.training.run_folder import RunFolder
from tests.tiny_run import tiny_recipe

SWEEPS = sorted(Path("recipes/sweeps").glob("*.toml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_shipped_sweep_is_read(path):
    recipes = read_sweep(path, [])
    assert len(recipes) > 1
    assert len({recipe.output.dir for recipe in recipes.values()}) == len(recipes)


def test_there_are_shipped_sweeps():
    assert [path.stem for path in SWEEPS] == ["ranks"]


def test_runs_are_shown_line_by_line_and_can_be_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(recipe_toml(tiny_recipe(tmp_path)))
    (tmp_path / "ranks.toml").write_text('recipe = "tiny.toml"\n[runs.low]\nmethod.rank = 2\n[runs.high]\nmethod.rank = 8\n')
    main(["ranks.toml", "train.steps=4"])
    out = capsys.readouterr().out
    for step in range(1, 5):
        (line,) = [line for line in out.splitlines() if line.startswith(f"step {step}/4")]
        assert "low " in line
        assert "high " in line
        assert "tok/s" in line
    assert out.count("40 rows of") == 1  # what concerns all runs is said once
    table = out.rpartition("run ")[2].splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["low", "high"]
    assert RunFolder(tmp_path / "runs" / "ranks" / "low").recipe().method.rank == 2
    main(["ranks.toml", "train.steps=4"])
    assert "finished already: low, high" in capsys.readouterr().out


def test_a_mistake_begins_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(recipe_toml(tiny_recipe(tmp_path)))
    (tmp_path / "ranks.toml").write_text('recipe = "tiny.toml"\n[runs.low]\nmethod.rank = 2\n[runs.high]\nmethod.rank = 1000\n')
    with pytest.raises(RecipeError, match="method.rank = 1000: is more than"):
        main(["ranks.toml"])
    assert not (tmp_path / "runs").exists()
