"""The tools for people with a card, as far as a CPU can run them: their checks hold, and a planted fault is told."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import LlamaConfig

from qlite.errors import ModelError
from qlite.memory.ledger import Peak
from qlite.model.known import KNOWN, known_config
from qlite.model.shapes import base_shapes
from qlite.offload import Lane
from qlite.quant.linear import Linear8bit
from qlite.recipe.read import read_recipe
from qlite.training.forecast import EVALUATION, OPTIMIZER_STEP, STEP, Forecast, trace, worst_workload
from qlite.training.step import Stepper

ROOT = Path(__file__).parents[1]
LLAMA = "meta-llama/Llama-3.2-3B-Instruct"
NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")


@pytest.fixture(scope="module")
def tools():
    """The tools' folder, from which its files can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        import fake_cuda
        import gpu_check

        yield {"gpu_check": gpu_check, "fake_cuda": fake_cuda}


@pytest.fixture
def check(tools, tmp_path):
    """Runs named checks on the CPU; gives the exit code and the verdicts by name."""

    def checked(name: str) -> tuple[int, dict[str, str]]:
        out = tmp_path / "figures.json"
        code = tools["gpu_check"].main(["--quick", "--device", "cpu", "--only", name, "--out", str(out)])
        written = json.loads(out.read_text())
        assert written["machine"]["torch"] == torch.__version__
        return code, {each["name"]: each["verdict"] for each in written["results"]}

    return checked


@pytest.mark.parametrize(
    ("name", "holds", "skips"),
    [
        ("products", 12, 0),
        ("vocabulary", 6, 0),
        ("paged", 4, 2),
        ("packing", 5, 2),
        ("out_of_memory", 3, 0),
        ("spill", 0, 1),
        ("recipes", 0, 1),
    ],
)
def test_the_checks_hold_between_a_cpu_and_itself(check, name, holds, skips):
    code, verdicts = check(name)
    assert code == 0
    assert sorted(verdicts.values()) == ["holds"] * holds + ["skipped"] * skips


@pytest.mark.slow
@pytest.mark.parametrize(("name", "holds", "others"), [("offload", 6, ["told"]), ("plan", 4, ["skipped", "skipped"]), ("resume", 4, [])])
def test_so_do_those_that_take_longer(check, name, holds, others):
    code, verdicts = check(name)
    assert code == 0
    assert sorted(verdicts.values()) == ["holds"] * holds + others


def test_a_card_recipe_runs_at_full_size_over_weights_that_no_disk_has(tools, tmp_path, monkeypatch):
    module, path = tools["gpu_check"].gpu_recipes, ROOT / "recipes" / "llama8b_8gb.toml"
    small = {**KNOWN["meta-llama/Llama-3.1-8B-Instruct"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    monkeypatch.setattr(module, "known_config", lambda _: LlamaConfig(**{k: v for k, v in small.items() if k != "model_type"}))
    monkeypatch.setattr(module, "SHARD_BYTES", 50_000)
    recipe = module.full_size(tools["gpu_check"].Bench(torch.device("cpu"), tmp_path, False), path, **{"train.tokens": 64})
    files = sorted((tmp_path / "llama8b_8gb" / "base").glob("model-*.safetensors"))
    assert len(files) > 1
    assert all(os.stat(file).st_blocks * 512 < 16_384 for file in files)
    own = read_recipe(path)
    for key in ("method", "optimizer", "memory", "base.bits", "train.micro_batch", "train.packing"):
        assert (recipe.get(key) if "." in key else getattr(recipe, key)) == (own.get(key) if "." in key else getattr(own, key))
    with module.random_weights():
        found = list(module.planned_and_measured(tools["gpu_check"].Bench(torch.device("cpu"), tmp_path, False), "tiny", recipe))
    assert [each.verdict for each in found] == ["holds", "holds", "skipped"]
    assert recipe.train.steps == 3


def wrong_product(layer: Linear8bit, x: torch.Tensor) -> torch.Tensor:
    return 1.05 * torch.nn.functional.linear(x, layer.dense(x.dtype), layer.bias)


def test_a_wrong_product_is_told(check, monkeypatch):
    monkeypatch.setattr(Linear8bit, "product", wrong_product)
    code, verdicts = check("products")
    assert code == 1
    assert [name for name, verdict in verdicts.items() if verdict == "FAILS"] == ["products: int8: product"]


def test_a_step_made_again_on_a_part_of_its_rows_is_told(check, monkeypatch):
    accumulate = Stepper.accumulate
    monkeypatch.setattr(Stepper, "accumulate", lambda self, batches: accumulate(self, batches[:1]))
    code, verdicts = check("out_of_memory")
    assert code == 1
    assert verdicts["out_of_memory: weights after the step"] == "FAILS"


@pytest.mark.slow
def test_a_copy_that_comes_too_late_is_told(check, monkeypatch):
    send = Lane.send_to_device

    def late(self, tensors):
        copies = send(self, tensors)
        for copy in copies._targets:
            copy.zero_()
        return copies

    monkeypatch.setattr(Lane, "send_to_device", late)
    code, verdicts = check("offload")
    assert code == 1
    assert verdicts["offload: 4 bit, saved_inputs = host: gradient"] == "FAILS"


@pytest.mark.slow
def test_a_plan_that_is_off_is_told(check, monkeypatch):
    peaks = Forecast.peaks

    def smaller(self):
        return {phase: Peak({term: int(0.9 * size) for term, size in peak.terms.items()}) for phase, peak in peaks(self).items()}

    monkeypatch.setattr(Forecast, "peaks", smaller)
    code, verdicts = check("plan")
    assert code == 1
    assert verdicts["plan: 17M, 4 bit: plan"] == "FAILS"


def test_a_check_that_breaks_stops_no_other(tools, tmp_path, monkeypatch, capsys):
    module = tools["gpu_check"]

    def breaks(bench):
        yield module.gpu_promises.at_most("one", 1.0, 2.0)
        raise RuntimeError("the first line\nthe second")

    monkeypatch.setattr(module, "CHECKS", {"breaks": breaks, "spill": module.CHECKS["spill"]})
    out = tmp_path / "figures.json"
    assert module.main(["--device", "cpu", "--out", str(out)]) == 1
    results = json.loads(out.read_text())["results"]
    assert [(each["name"], each["verdict"]) for each in results] == [
        ("breaks: one", "holds"),
        ("breaks", "FAILS"),
        ("spill: figures", "skipped"),
    ]
    assert results[1]["figure"] == "RuntimeError: the first line"
    assert "the second" not in capsys.readouterr().out


@pytest.mark.parametrize(("value", "verdict"), [(1.0, "holds"), (2.0, "holds"), (2.1, "FAILS"), (float("nan"), "FAILS")])
def test_a_figure_is_held_to_its_limit(tools, value, verdict):
    assert tools["gpu_check"].gpu_promises.at_most("", value, 2.0).verdict == verdict


@NO_CARD
def test_without_a_card_one_sentence_says_so(tools, capsys):
    assert tools["gpu_check"].main([]) == 2
    assert capsys.readouterr().err == (
        f"there is no CUDA card that torch {torch.__version__} can use, and there is nothing else to check\n"
    )


# tools/fake_cuda.py


@pytest.mark.skipif(torch.version.cuda is not None, reason="a build with CUDA")
def test_a_build_without_cuda_is_told_how_to_get_one(tools, capsys):
    assert tools["fake_cuda"].main([]) == 2
    assert 'pip install "torch===2.13.0"' in capsys.readouterr().err


def test_every_case_is_a_recipe(tools):
    for name, keys in tools["fake_cuda"].CASES.items():
        assert read_recipe(ROOT / "recipes/llama8b_8gb.toml", keys).problems() == [], name


@pytest.mark.slow
def test_what_it_traces_is_what_a_plan_traces(tools):
    tool = tools["fake_cuda"]
    recipe = read_recipe(ROOT / "recipes/qwen0.5b_4gb.toml", ["train.tokens=128", "memory.saved_inputs=host", "memory.mlp_chunk=64"])
    shapes = base_shapes(recipe.base, lambda *_: None)
    shapes = replace(shapes, config=tool.cut(shapes.config, tool.BLOCKS))
    found = tool.trace_on(torch.device("cpu"), recipe, shapes, worst_workload(recipe))
    planned = trace(recipe, shapes, worst_workload(recipe)).peaks()
    for phase in (STEP, OPTIMIZER_STEP, EVALUATION):
        assert found[phase].bytes == planned[phase].bytes, phase


def test_bitsandbytes_ops_are_held_to_one_device(tools):
    codes, scale = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4)
    with FakeTensorMode(allow_non_fake_inputs=True), tools["fake_cuda"].SameDevice():
        assert torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, scale).shape == (4, 8)
        with pytest.raises(RuntimeError, match="int8_vectorwise_dequant.default: its tensors are on cpu, meta"):
            torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, torch.ones(4, device="meta"))


def test_a_fault_is_told_with_our_line_and_a_refusal_is_none(tools):
    tool = tools["fake_cuda"]
    with pytest.raises(ModelError) as caught:
        read_recipe(ROOT / "recipes/llama3b_6gb.toml", ["base.attention=flex"]).base.empty(
            tool.cut(known_config(LLAMA), 1), torch.device("cpu")
        )
    assert [str(path) for path, _ in tool.places_of_ours(caught.value)][-1] == "qlite/model/attention.py"
    refused = tool.outcome_of(ROOT / "recipes/llama3b_6gb.toml", "tied", ["memory.embedding=host", "train.tokens=64"])
    assert refused.is_refusal
    assert "tie_word_embeddings" in refused.line()
