"""memory.checkpointing = "auto" takes what computes least again and leaves room, and a run keeps it."""

import pytest

from qlite.errors import ModelError
from qlite.memory.ledger import Peak
from qlite.memory.plan import MemoryPlan
from qlite.recipe.read import build_recipe
from qlite.recipe.schema import Recipe
from qlite.training.automatic import settled

NEEDS = {"none": 900, "attention": 500, "block": 100}


def recipe(**memory: object) -> Recipe:
    return build_recipe({"base": {"model": "x"}, "data": {"train": "x"}, "train": {"steps": 1}, "memory": memory}, "a test")


def chosen(capacity: int, **memory: object) -> str:
    def plan(changed: Recipe) -> MemoryPlan:
        return MemoryPlan({"training": Peak({"all": NEEDS[changed.memory.checkpointing]})}, capacity, "a card")

    return settled(recipe(**memory), plan).memory.checkpointing


@pytest.mark.parametrize(
    ("capacity", "choice"), [(1001, "none"), (1000, "none"), (999, "attention"), (556, "attention"), (555, "block"), (10, "block")]
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
