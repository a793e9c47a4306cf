"""Runs of the methods around LoRA, alone and combined: stopped and gone on with, opened, evaluated, exported, or refused with a reason."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlite.errors import AdapterError, ExportError, NotMergeable, QliteError, RunError
from qlite.evaluate import evaluate
from qlite.export import export
from qlite.formats.foreign import read_foreign_adapter
from qlite.formats.peft import CONFIG, PREFIX, WEIGHTS
from qlite.generate import generate
from qlite.model.shapes import base_shapes
from qlite.recipe.read import build_recipe
from qlite.recipe.schema import Recipe
from qlite.training.adapter_folders import parse_adapters, read_updates
from qlite.training.forecast import EVALUATION, OPTIMIZER_STEP, STEP, forecast, trace, worst_workload
from qlite.training.merging import Merge
from qlite.training.open_run import open_run
from qlite.training.run_folder import RunFolder
from tests.marks import slow
from tests.tiny_run import opened_run, run, tiny_tables

QUICK = {"exact_match_rows": 0, "eval_every": 0}
CASES = {
    "full": {"name": "full"},
    "galore": {"name": "galore", "rank": 4, "update_every": 4},
    "ia3": {"name": "ia3"},
    "bottleneck": {"name": "bottleneck", "width": 8},
    "lora + ia3": {"name": ["lora", "ia3"], "lora": {"rank": 4, "dropout": 0.1}, "ia3": {"targets": ["k_proj", "down_proj"]}},
    "bottleneck + lora": {"name": ["bottleneck", "lora"], "bottleneck": {"width": 8, "placement": "pfeiffer"}, "lora": {"rank": 4}},
}
WHOLE = ("full", "galore")
MERGED = ("full", "galore", "ia3", "lora + ia3")
FIRST = ("full", "ia3", "lora + ia3")
"""What a default run of the tests trains; the laws of tests/methods/test_contract.py hold for all."""


def some(cases: Iterable[str]) -> list:
    """Return ``cases`` with all but the first ones for ``-m slow``."""
    return [case if case in FIRST else slow(case) for case in cases]


def recipe_of(folder: Path, case: str, **changes: dict) -> Recipe:
    base = {"bits": 16} if case in WHOLE else {}
    tables = tiny_tables(folder, **{"train": QUICK, "base": base, **changes})
    return build_recipe({**tables, "method": CASES[case]}, "tiny.toml")


def ran(folder: Path, case: str, stop_after: int | None = None, **changes: dict) -> Path:
    """Run ``case`` in ``folder``, stopped and gone on with if asked for; return the written adapter's folder."""
    folder.mkdir(exist_ok=True)
    recipe = recipe_of(folder, case, **changes)
    if stop_after:
        run(recipe, stop_after)
    run(recipe)
    return folder / "run" / "adapter"


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(3, 15).unsqueeze(0)).logits.float()


def losses_of(folder: Path) -> list[float]:
    """Return the loss of each step of the run in ``folder``."""
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "lr" in record]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Callable[[str], Path]:
    """Gives the folder with the finished run of a case, which is made when it is first asked for."""
    folder = tmp_path_factory.mktemp("methods")

    @cache
    def folder_of(case: str) -> Path:
        ran(folder / case, case)
        return folder / case

    return folder_of


@pytest.mark.parametrize("case", some(CASES))
def test_stopped_and_gone_on_with_it_ends_with_the_same_bytes(case, done, tmp_path):
    again = ran(tmp_path / "stopped", case, 3)
    assert (done(case) / "run" / "adapter" / WEIGHTS).read_bytes() == (again / WEIGHTS).read_bytes()
    losses = losses_of(done(case))
    # What a few hundred factors learn in six steps does not show among six batches; of theirs the next test asks.
    assert losses[-1] < losses[0] or case == "ia3"
    assert case.replace("lora", "LoRA") in (done(case) / "run" / "report.html").read_text()


@pytest.mark.parametrize("case", ["lora + ia3", slow("ia3"), slow("bottleneck + lora")])
def test_with_the_frozen_base_on_the_host_it_ends_with_the_same_bytes(case, done, tmp_path):
    host = ran(tmp_path / "host", case, memory={"base": "host", "embedding": "host", "saved_inputs": "host"})
    assert (done(case) / "run" / "adapter" / WEIGHTS).read_bytes() == (host / WEIGHTS).read_bytes()


@pytest.mark.parametrize("case", list(map(slow, ("galore", "full", "ia3", "bottleneck"))))
def test_packed_and_with_the_mlps_in_tiles_it_learns(case, tmp_path):
    ran(tmp_path, case, memory={"mlp_chunk": 16, "saved_inputs": "host"}, train={**QUICK, "packing": True, "micro_batch": 1})
    losses = losses_of(tmp_path)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert case.replace("lora", "LoRA") in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("case", some(CASES))
def test_opened_again_it_is_not_the_base_and_has_what_was_saved(case, done):
    opened = opened_run(done(case))
    plain = open_run(RunFolder(done(case) / "run"), "cpu", lambda *_: None)
    assert not torch.equal(logits_of(opened.base.model), logits_of(plain.base.model))
    saved = load_file(done(case) / "run" / "adapter" / WEIGHTS)
    own = dict(opened.base.model.named_parameters())
    assert all(torch.equal(tensor, own[name.removeprefix(PREFIX)]) for name, tensor in saved.items())
    assert (len(saved) == len(own)) == (case in WHOLE)


@pytest.mark.parametrize("case", some(MERGED))
def test_merged_it_answers_as_the_run(case, done, tmp_path):
    found = export(done(case) / "run", merge=Merge(torch.float32, "dequantised"), out=tmp_path / "merged", device="cpu", quiet=True)
    live = logits_of(opened_run(done(case)).base.model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    # The run rounds every product to bfloat16.
    assert (logits_of(merged) - live).abs().max() < 0.05 * live.abs().max()
    assert found.audit.found["dequantised"].kl < 1e-2
    # There is no base in a model that was trained itself, so nothing is said of what training has changed.
    assert (found.audit.base is None) == (found.audit.left is None) == (case in WHOLE)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"tags: [qlite, {case.replace(' + ', ', ')}]" in card
    assert ("merged over | the dequantised weights" in card) == (", merged over the" in found.what) == (case not in WHOLE)


@pytest.mark.parametrize("case", list(map(slow, (case for case in CASES if case not in MERGED))))
def test_what_is_no_change_of_weights_is_not_merged_and_nothing_is_written(case, done, tmp_path):
    with pytest.raises(NotMergeable, match="a network of its own and no change of a weight.*; generate, chat and evaluate answer"):
        export(done(case) / "run", merge="fp16", out=tmp_path / "merged", device="cpu", quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", some(WHOLE))
def test_weights_that_were_trained_are_merged_over_no_others(case, done, tmp_path):
    with pytest.raises(QliteError, match="--onto original: this run has trained the weights themselves"):
        export(done(case) / "run", merge=Merge(onto="original"), out=tmp_path / "merged", device="cpu", quiet=True)


@pytest.mark.parametrize("case", some(CASES))
def test_as_an_adapter_it_is_written_where_peft_has_such_a_one(case, done, tmp_path):
    if case != "ia3":
        way = "--merge writes it into the base's weights" if case in MERGED else "generate, chat and evaluate answer"
        with pytest.raises(ExportError, match=rf"PEFT has no adapter of this kind .*adapter_model.safetensors; {way}"):
            export(done(case) / "run", adapter="peft", out=tmp_path / "peft", quiet=True)
        return
    export(done(case) / "run", adapter="peft", out=tmp_path / "peft", quiet=True)
    base = AutoModelForCausalLM.from_pretrained(done(case) / "base", dtype=torch.float32)
    assert json.loads((tmp_path / "peft" / CONFIG).read_text())["peft_type"] == "IA3"
    model = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    assert not torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(done(case) / "base", dtype=torch.float32)))


@pytest.mark.parametrize("case", some(CASES))
def test_a_gguf_adapter_is_loras_alone(case, done, tmp_path):
    way = "--gguf f16 merges it" if case in MERGED else "generate, chat and evaluate answer"
    with pytest.raises(ExportError, match=f"llama.cpp's adapters are LoRA's, and this run has trained by .*; {way}"):
        export(done(case) / "run", adapter="gguf", out=tmp_path / "gguf", device="cpu", quiet=True)


@pytest.mark.parametrize("case", some(CASES))
def test_beside_others_on_one_base_only_low_rank_updates_are_put(case, done):
    (given,), problems = parse_adapters([f"a={done(case) / 'run'}"])
    assert problems == []
    found: list[str] = []
    assert read_updates(given, found) == {}
    assert len(found) == 1
    assert f"its method is {RunFolder(given.path).recipe().method.words}, and only low-rank updates stand beside others" in found[0]
    if case == "ia3":  # its files alone, as of another program
        with pytest.raises(
            AdapterError, match=r"holds factors of linears \(.*\); only low-rank updates of linears stand beside each other"
        ):
            read_foreign_adapter(given.folder).updates(given.folder)


@pytest.mark.parametrize("case", some(WHOLE))
def test_evaluated_its_base_is_the_one_before_training(case, done):
    """It is gone from the trained model: measured after training, both columns would be the same."""
    whole = evaluate(done(case) / "run", metrics="loss", quiet=True, device="cpu").scores
    other = evaluate(done("ia3") / "run", metrics="loss", quiet=True, device="cpu").scores
    assert whole["adapter"]["loss"] < whole["base"]["loss"]
    assert whole["base"]["loss"] == pytest.approx(other["base"]["loss"], rel=0.05)  # over 4 bit


@pytest.mark.parametrize("case", some(WHOLE))
def test_asked_for_the_base_a_run_without_one_says_so(case, done):
    with pytest.raises(RunError, match=r"--base: .* has trained the model's own weights .*; python -m qlite.evaluate measures both"):
        generate(done(case) / "run", "abc", base=True, quiet=True, device="cpu")
    assert len(generate(done(case) / "run", "abc", quiet=True, device="cpu").texts) == 1


def test_a_run_says_that_it_writes_whole_models(tmp_path):
    watcher = run(recipe_of(tmp_path, "full", train={**QUICK, "steps": 2}))
    assert any("the adapter is the whole model" in note for note in watcher.notes)


@pytest.mark.parametrize("case", ["galore", *map(slow, ("bottleneck + lora", "full", "ia3", "bottleneck", "lora + ia3"))])
def test_a_run_measures_what_was_planned(case, tmp_path):
    ran(tmp_path, case, memory={"plan": "tell"}, train={**QUICK, "steps": 2, "accumulation": 1})
    record = json.loads((tmp_path / "run" / "memory.json").read_text())
    for phase in (STEP, OPTIMIZER_STEP):
        planned, measured = (record[kind].get("phases", record[kind])[phase]["bytes"] for kind in ("planned", "measured"))
        assert abs(planned - measured) <= max(0.01 * measured, 2100), phase  # bitsandbytes' code tables of 2 KiB are made once a process


@pytest.mark.parametrize("case", list(map(slow, ("galore", "full", "lora + ia3", "bottleneck"))))
def test_two_short_models_plan_as_the_whole_one(case, tmp_path):
    recipe = recipe_of(tmp_path, case)
    shapes = base_shapes(recipe.base, lambda *_: None)
    shapes.config.num_hidden_layers = 7
    work = replace(worst_workload(recipe), answers=None)
    short, whole = forecast(recipe, shapes, work).peaks(), trace(recipe, shapes, work).peaks()
    for phase in (STEP, OPTIMIZER_STEP, EVALUATION):
        assert short[phase].bytes == whole[phase].bytes, phase
