"""A run goes on under other memory keys where they change no number, and says so; where they would, it does not."""

import json

import pytest

from qlite.errors import RunError
from qlite.hashes import sha256
from qlite.training.run_folder import RunFolder
from tests.tiny_run import run, tiny_recipe

CHANGES = {
    "inputs on the host": {"saved_inputs": "host"},
    "base on the host": {"base": "host"},
    "no checkpointing": {"checkpointing": "none"},
    "norms and SwiGLU made again": {"checkpointing": "elementwise"},
    "only told": {"plan": "tell"},
}


def adapter_sum(folder) -> str:
    return sha256(folder / "run" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_goes_on_with_other_memory_keys_to_the_same_bytes(name, tmp_path):
    for place in ("whole", "changed"):
        (tmp_path / place).mkdir()
    run(tiny_recipe(tmp_path / "whole"))
    run(tiny_recipe(tmp_path / "changed"), stop_after=3)
    recipe = tiny_recipe(tmp_path / "changed", memory=CHANGES[name])
    seen = run(recipe)
    (key,) = CHANGES[name]
    assert any(f"since the run began the recipe has changed: memory.{key}: " in note for note in seen.notes)
    assert adapter_sum(tmp_path / "changed") == adapter_sum(tmp_path / "whole")
    folder = RunFolder(tmp_path / "changed" / "run")
    assert getattr(folder.recipe().memory, key) == CHANGES[name][key]
    assert folder.is_finished


@pytest.mark.parametrize(("before", "after"), [(32, 7), (7, 32)])
def test_a_loss_chunk_that_is_asked_for_on_resuming_is_taken(before, after, tmp_path):
    run(tiny_recipe(tmp_path, memory={"loss_chunk": before}), stop_after=4)
    run(tiny_recipe(tmp_path, memory={"loss_chunk": after}))
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert json.loads((newest / "state.json").read_text())["loss_chunk"] == after


@pytest.mark.parametrize(
    "changes", [{"memory": {"saved_inputs": "8bit"}}, {"train": {"micro_batch": 1}}, {"base": {"bits": 8}}], ids=["inputs", "rows", "base"]
)
def test_what_changes_numbers_is_refused(changes, tmp_path):
    run(tiny_recipe(tmp_path), stop_after=2)
    before = (tmp_path / "run" / "recipe.toml").read_bytes()
    with pytest.raises(RunError, match="holds a run of another recipe"):
        run(tiny_recipe(tmp_path, **changes))
    assert (tmp_path / "run" / "recipe.toml").read_bytes() == before


def test_memory_json_holds_the_largest_of_all_parts_of_a_run(tmp_path):
    folder = RunFolder(tmp_path)

    def record(process: int, **phases: int) -> dict:
        return {"planned": None, "measured": {name: {"bytes": size} for name, size in phases.items()}, "process_peak": process}

    folder.write_memory(record(70, load=5, training=90))
    merged = folder.write_memory(record(60, training=80, optimizer=7))
    assert merged == json.loads((tmp_path / "memory.json").read_text())
    assert merged["process_peak"] == 70
    assert {name: peak["bytes"] for name, peak in merged["measured"].items()} == {"load": 5, "training": 90, "optimizer": 7}


def test_a_stopped_run_has_its_memory_told_already(tmp_path):
    run(tiny_recipe(tmp_path), stop_after=4)
    assert json.loads((tmp_path / "run" / "memory.json").read_text())["measured"]["training"]["bytes"] > 0
