"""Keys of [memory] that need checkpointed blocks say so."""

import pytest

from qlite.errors import RecipeError
from qlite.recipe.read import build_recipe
from qlite.recipe.schema import WHOLE


def problems(**memory: object) -> list[str]:
    tables = {"base": {"model": "some/model"}, "data": {"train": "rows.jsonl"}, "train": {"steps": 1}, "memory": memory}
    try:
        build_recipe(tables, "my.toml")
    except RecipeError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(("key", "value"), [("saved_inputs", "host"), ("saved_inputs", "8bit"), ("base", "host")])
@pytest.mark.parametrize("checkpointing", WHOLE)
def test_what_needs_checkpointing_says_so(key, value, checkpointing):
    assert problems(**{key: value}) == []
    (problem,) = problems(**{key: value}, checkpointing=checkpointing)
    assert problem.startswith(f'memory.{key} = "{value}": ')
    assert problem.endswith(f'and memory.checkpointing = "{checkpointing}"; set that to "block"')


def test_what_is_made_again_has_to_be_fused():
    tables = {"base": {"model": "m", "fused": False}, "data": {"train": "rows.jsonl"}, "train": {"steps": 1}}
    with pytest.raises(RecipeError, match=r'checkpointing = "elementwise": .*base.fused = false; set that to true'):
        build_recipe({**tables, "memory": {"checkpointing": "elementwise"}}, "my.toml")


def test_both_are_said_at_once_and_the_others_need_nothing():
    assert len(problems(saved_inputs="host", base="host", checkpointing="none")) == 2
    assert problems(mlp_chunk=512, embedding="host", checkpointing="none") == []


@pytest.mark.parametrize("wrong", [{"saved_inputs": "4bit"}, {"mlp_chunk": -1}, {"embedding": "disk"}, {"base": "disk"}])
def test_other_values_are_refused(wrong):
    (problem,) = problems(**wrong)
    assert problem.startswith(f"memory.{next(iter(wrong))} = ")
