"""What is no number, or jumps, is never stepped and never saved: it is skipped, and too much of it ends the run."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlite.errors import Diverged
from qlite.hashes import sha256
from qlite.optim.build import FlatOptimizer
from qlite.training.run_folder import RunFolder
from qlite.training.step import Stepper
from tests.tiny_run import run, tiny_recipe

QUIET = {"eval_every": 0, "exact_match_rows": 0}


def spoil(monkeypatch, steps: set[int], loss: float = math.nan, grad: float | None = None) -> None:
    """Let the steps of these numbers come out with ``loss``, or with a gradient that has ``grad`` in it."""
    accumulate, calls = Stepper.accumulate, []

    def spoilt(self, batches):
        calls.append(1)
        result = accumulate(self, batches)
        if len(calls) not in steps:
            return result
        if grad is not None:
            spoilt.optimizer.flats[0].grad[0] = grad
            return result
        return torch.tensor(loss)

    step = Stepper.step

    def remembering(self, batches, optimizer, *args):
        spoilt.optimizer = optimizer
        return step(self, batches, optimizer, *args)

    monkeypatch.setattr(Stepper, "accumulate", spoilt)
    monkeypatch.setattr(Stepper, "step", remembering)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{path}:{name}": tensor for path in folder.rglob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("fault", [{"loss": math.nan}, {"loss": math.inf}, {"grad": math.nan}, {"grad": -math.inf}])
def test_a_step_that_is_no_number_is_skipped_and_the_run_goes_on(tmp_path, monkeypatch, fault):
    spoil(monkeypatch, {2, 4}, **fault)
    seen = run(tiny_recipe(tmp_path, train=QUIET))
    assert [report.step for report in seen.steps] == [1, 3, 5, 6]
    told = [note for note in seen.notes if "is skipped" in note]
    assert [note.partition(",")[0] for note in told] == ["step 2 is skipped", "step 4 is skipped"]
    assert all("1 of at most 3 in a row" in note and "train.jsonl line" in note for note in told)
    assert RunFolder(tmp_path / "run").is_finished
    assert all(tensor.isfinite().all() for tensor in all_tensors(tmp_path / "run").values())


def test_a_skipped_step_leaves_parameters_and_optimizer_as_they_were(tmp_path, monkeypatch):
    run(tiny_recipe(tmp_path, train={**QUIET, "steps": 3}, output={"save_every": 1, "keep": 9}), stop_after=3)
    checkpoints = tmp_path / "run" / "checkpoints"
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    spoil(monkeypatch, {3})
    run(tiny_recipe(spoilt, train={**QUIET, "steps": 3}, output={"save_every": 1, "keep": 9}))
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert sha256(spoilt / "run/checkpoints/step-00000003" / name) == sha256(checkpoints / "step-00000002" / name)


def test_too_many_in_a_row_end_the_run_with_checkpoint_and_rows(tmp_path, monkeypatch):
    spoil(monkeypatch, {3, 4, 5})
    with pytest.raises(Diverged) as caught:
        run(tiny_recipe(tmp_path, train={**QUIET, "max_skipped": 2, "micro_batch": 4, "accumulation": 3}))
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert message.startswith("steps 3 to 5: loss nan, gradient norm ")
    assert "3 in a row (train.max_skipped = 2)" in message
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-00000004'}" in message
    assert message.count("train.jsonl line") == 8
    assert "and 4 more" in message
    assert "Lower optimizer.lr" in message


def test_without_any_checkpoint_it_is_said(tmp_path, monkeypatch):
    spoil(monkeypatch, set(range(1, 9)))
    with pytest.raises(Diverged, match=r"step 1: loss nan.*1 in a row.*is not there: none was written yet"):
        run(tiny_recipe(tmp_path, train={**QUIET, "max_skipped": 0}))


def test_a_run_in_which_no_step_could_be_made_has_trained_nothing(tmp_path, monkeypatch):
    spoil(monkeypatch, {1, 2})
    with pytest.raises(Diverged, match="none of 2 steps could be made"):
        run(tiny_recipe(tmp_path, train={**QUIET, "steps": 2}))
    assert not RunFolder(tmp_path / "run").is_finished


def test_steps_in_a_row_are_counted_over_a_stop(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, train={**QUIET, "max_skipped": 1}, output={"save_every": 1})
    run(recipe, stop_after=2)
    with monkeypatch.context() as patch:
        spoil(patch, {2})  # step 2 is made again, and 3 is skipped and saved
        run(recipe, stop_after=4)
    with monkeypatch.context() as patch:
        spoil(patch, {1, 2})
        with pytest.raises(Diverged, match="steps 3 to 4"):
            run(recipe)


def test_more_may_be_skipped_when_the_run_goes_on(tmp_path, monkeypatch):
    spoil(monkeypatch, {3, 4, 5, 6})  # 5 and 6 are 3 and 4 again
    with pytest.raises(Diverged, match="train.max_skipped may be raised"):
        run(tiny_recipe(tmp_path, train={**QUIET, "max_skipped": 1}, output={"save_every": 2}))
    seen = run(tiny_recipe(tmp_path, train={**QUIET, "max_skipped": 2}, output={"save_every": 2}))
    assert any("train.max_skipped: 1 -> 2" in note for note in seen.notes)
    assert [report.step for report in seen.steps] == [5, 6]
    assert RunFolder(tmp_path / "run").is_finished


def test_a_jump_of_the_loss_is_skipped_where_the_recipe_asks_for_it(tmp_path, monkeypatch):
    train = {**QUIET, "steps": 14, "accumulation": 1}
    spoil(monkeypatch, {12}, loss=40.0)
    seen = run(tiny_recipe(tmp_path, train={**train, "spike_factor": 3.0}))
    assert 12 not in [report.step for report in seen.steps]
    assert any("step 12 is skipped" in note and "train.spike_factor allows" in note for note in seen.notes)


def test_and_only_there(tmp_path, monkeypatch):
    spoil(monkeypatch, {12}, loss=40.0)
    seen = run(tiny_recipe(tmp_path, train={**QUIET, "steps": 14, "accumulation": 1}))
    assert 12 in [report.step for report in seen.steps]


def test_what_a_jump_is_measured_by_survives_a_stop(tmp_path):
    recipe = tiny_recipe(tmp_path, train={**QUIET, "spike_factor": 3.0}, output={"save_every": 2})
    run(recipe, stop_after=5)
    state = RunFolder(tmp_path / "run")._read("checkpoints/step-00000004/state.json")
    losses = [record["loss"] for record in RunFolder(tmp_path / "run").records.read() if record["kind"] == "step"]
    assert state["recent"] == losses[:4]


def test_parameters_that_are_no_numbers_are_never_saved(tmp_path, monkeypatch):
    step, calls = FlatOptimizer.step, []

    def overflowing(self):
        step(self)
        calls.append(1)
        if len(calls) == 4:
            self.flats[0].weight[0] = math.inf

    monkeypatch.setattr(FlatOptimizer, "step", overflowing)
    with pytest.raises(Diverged, match=r"after step 4, .*lora_A.* not finite, so nothing of it was saved.*step-00000002"):
        run(tiny_recipe(tmp_path, train=QUIET))
    assert all(tensor.isfinite().all() for tensor in all_tensors(tmp_path / "run").values())
