"""A trace that was made is read again, whole, and only where everything that decides it is the same."""

from dataclasses import replace

import pytest
import torch

from qlite.data.batches import Batch
from qlite.model.shapes import BaseShapes
from qlite.recipe.read import build_recipe
from qlite.recipe.schema import Recipe
from qlite.training import kept_plans
from qlite.training.forecast import Forecast, Workload, forecast, one_row
from qlite.training.kept_plans import FORECAST, kept_forecast
from tests.tiny import tiny_llama

WORK = Workload(Batch.of([one_row(16)] * 2, 0), Batch.of([one_row(9)], 0), (2, 8, 4))
SHAPES = BaseShapes(tiny_llama().config, "made here")


def recipe(**memory: object) -> Recipe:
    return build_recipe({"base": {"model": "x", "bits": 4}, "data": {"train": "x"}, "train": {"steps": 1}, "memory": memory}, "a test")


@pytest.fixture
def traced(tmp_path, monkeypatch) -> list[Forecast]:
    """What is traced, from an empty cache on."""
    made = []

    def counting(*args: object) -> Forecast:
        made.append(forecast(*args))
        return made[-1]

    monkeypatch.setattr(kept_plans, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(kept_plans, "forecast", counting)
    return made


def test_a_kept_forecast_is_the_traced_one(traced):
    first, second = (kept_forecast(recipe(), SHAPES, WORK) for _ in range(2))
    assert len(traced) == 1
    assert second.moments == first.moments
    assert list(second.moments) == list(first.moments)
    assert second.int8_bytes == first.int8_bytes
    for part in ("flops", "bytes", "kernels"):
        assert getattr(second.work, part) == getattr(first.work, part) > 0
    assert second.work.as_record() == first.work.as_record()


@pytest.mark.slow
def test_whatever_decides_a_trace_makes_another(traced):
    positions = replace(WORK.train, position_ids=torch.arange(16).remainder(8).expand(2, 16))
    untrained = replace(WORK.train, labels=torch.where(torch.arange(16) < 8, -100, WORK.train.labels))
    config = tiny_llama().config
    config.vocab_size += 1
    cases = [
        (recipe(), SHAPES, WORK),
        (recipe(loss_chunk=64), SHAPES, WORK),
        (recipe(), replace(SHAPES, config=config), WORK),
        (recipe(), replace(SHAPES, dtypes={"lm_head.weight": torch.float32}), WORK),
        (recipe(), SHAPES, replace(WORK, train=positions)),
        (recipe(), SHAPES, replace(WORK, train=untrained)),
        (recipe(), SHAPES, replace(WORK, answers=None)),
    ]
    for case in cases:
        kept_forecast(*case)
    assert len(traced) == len(cases)


def test_a_damaged_record_is_made_anew_and_a_full_disk_stops_nothing(traced, tmp_path, monkeypatch):
    kept_forecast(recipe(), SHAPES, WORK)
    (path,) = tmp_path.glob(f"plans/*/{FORECAST}")
    path.write_text("[]", encoding="utf-8")
    kept_forecast(recipe(), SHAPES, WORK)
    assert len(traced) == 2
    monkeypatch.setattr(kept_plans, "cache_folder", lambda: path)  # a file, where a folder should be
    assert kept_forecast(recipe(), SHAPES, WORK).moments == traced[0].moments
