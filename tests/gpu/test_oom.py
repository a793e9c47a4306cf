"""A card that really runs full: a run gets through, with the adapter of the run that had room."""

import pytest
import torch

from tests.tiny_run import run
from tests.training.test_oom import adapter, large_rows, recipe_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]


def test_a_run_on_a_card_that_runs_full_gets_through_with_the_same_adapter(tmp_path):
    seen = {}
    total = torch.cuda.get_device_properties(0).total_memory
    for name in ("free", "full"):
        (tmp_path / name).mkdir()
        recipe = recipe_of(tmp_path / name, {}, **large_rows(tmp_path / name), parallel={"device": "cuda"})
        if seen:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(0.5 * max(step.memory.peak for step in seen["free"].steps) / total)
        try:
            seen[name] = run(recipe)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert [step.oom_retries for step in seen["free"].steps] == [0, 0]
    assert seen["full"].steps[0].oom_retries > 0
    mine, wanted = adapter(tmp_path / "full"), adapter(tmp_path / "free")
    assert max((mine[key] - wanted[key]).abs().max() for key in mine) < 1e-3
