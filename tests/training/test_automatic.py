"""memory.checkpointing = "auto" takes what computes least again and leaves room, and a run keeps it."""

from pathlib import Path

import pytest

from qlite.errors import ModelError
from qlite.memory.ledger import Peak
from qlite.memory.plan import MemoryPlan
from qlite.recipe.read import build_recipe
from qlite.recipe.schema import Recipe
from qlite.training import planning
from qlite.training.automatic import settled
from qlite.training.budget import as_begun
from qlite.training.run_folder import RunFolder
from tests.tiny_run import run, tiny_recipe

NEEDS = {"none": 900, "elementwise": 700, "attention": 500, "block": 100}


def recipe(**memory: object) -> Recipe:
    return build_recipe({"base": {"model": "x"}, "data": {"train": "x"}, "train": {"steps": 1}, "memory": memory}, "a test")


def chosen(capacity: int, **memory: object) -> str:
    def plan(changed: Recipe) -> MemoryPlan:
        return MemoryPlan({"training": Peak({"all": NEEDS[changed.memory.checkpointing]})}, capacity, "a card")

    return settled(recipe(**memory), plan).memory.checkpointing


@pytest.mark.parametrize(
    ("capacity", "choice"),
    [
        (1001, "none"),
        (1000, "none"),
        (999, "elementwise"),
        (778, "elementwise"),
        (777, "attention"),
        (556, "attention"),
        (555, "block"),
        (10, "block"),
    ],
)
def test_the_least_that_is_computed_again_and_leaves_a_tenth_free(capacity, choice):
    assert chosen(capacity) == choice


def test_what_needs_checkpointed_blocks_has_them():
    assert chosen(10**6, saved_inputs="host") == "attention"
    assert chosen(10**6, base="host") == "attention"


def test_what_the_recipe_says_stays():
    for choice in NEEDS:
        assert chosen(10**6, checkpointing=choice) == choice


def test_a_family_that_cannot_keep_its_attention_gets_block():
    def plan(changed: Recipe) -> MemoryPlan:
        if changed.memory.checkpointing == "attention":
            raise ModelError("cannot")
        return MemoryPlan({"training": Peak({"all": 900})}, 950, "a card")

    assert settled(recipe(), plan).memory.checkpointing == "block"


def test_without_a_plan_it_is_what_needs_least():
    assert chosen(10**6, plan="off") == "block"


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Path, Recipe]:
    """A run of four steps that chose "none" and was stopped after two."""
    folder = tmp_path_factory.mktemp("automatic")
    keys = {
        "memory": {"plan": "tell"},
        "train": {"steps": 4, "exact_match_rows": 0},
        "output": {"save_every": 1, "dir": str(folder / "run")},
    }
    recipe = tiny_recipe(folder, **keys)
    assert recipe.memory.checkpointing == "auto"
    run(recipe, stop_after=2)
    return folder, recipe


def test_a_run_chooses_by_its_plan_once_and_keeps_it(begun, monkeypatch):
    folder, recipe = begun
    kept = RunFolder(folder / "run")
    assert kept.recipe().memory.checkpointing == "none"
    monkeypatch.setattr(planning.device, "free_memory", lambda _: 1000)  # by which it would choose "block" now
    again = as_begun(recipe, kept, fresh=False)
    assert again.memory.checkpointing == "none"
    assert as_begun(recipe, kept, fresh=True).memory.checkpointing == "auto"
    notes = run(again).notes
    assert kept.is_finished
    assert not any("has changed: memory" in note for note in notes)


@pytest.mark.parametrize("key", ["saved_inputs", "base"])
def test_a_run_that_goes_on_with_a_key_that_needs_checkpointed_blocks_chooses_anew(begun, key):
    folder, recipe = begun
    changed = as_begun(recipe.having({f"memory.{key}": "host"}), RunFolder(folder / "run"), fresh=False)
    assert changed.memory.checkpointing == "auto"
