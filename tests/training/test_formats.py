"""A checkpoint that an earlier version wrote is gone on with: tests/golden/checkpoint/<version> was written by that version."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlite.files import is_whole
from qlite.formats.peft import adapter_tensors
from qlite.training.run import prepare
from qlite.training.run_folder import RunFolder
from tests.tiny_run import Watcher, tiny_recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"
SMALL = {"method": {"rank": 1, "targets": ["q_proj"]}, "train": {"spike_factor": 3.0, "eval_every": 2, "exact_match_rows": 0}}
VERSIONS = sorted(path.name for path in GOLDEN.iterdir())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(version, tmp_path):
    written = GOLDEN / version
    assert is_whole(written)
    parts = prepare(tiny_recipe(tmp_path, **SMALL), Watcher())
    run = RunFolder(tmp_path / "run")
    shutil.copytree(written, run.path / "checkpoints" / "step-00000004")
    state = run.resume(parts.model, parts.optimizer, lambda _: None)
    saved = json.loads((written / "state.json").read_text())
    assert (state.step, state.best_step, state.measured, len(state.recent)) == (4, saved["best_step"], 4, 4)
    tensors, numbers = parts.optimizer.state()
    for stored, held in (
        (written / "adapter_model.safetensors", adapter_tensors(parts.model)),
        (written / "optimizer.safetensors", tensors),
    ):
        expected = load_file(stored)
        assert set(expected) == set(held)
        assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())
    assert numbers == saved["optimizer"]


def test_there_is_one_of_this_version():
    from qlite import __version__

    assert __version__ in VERSIONS
