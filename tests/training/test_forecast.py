"""The plan of a run is what the run measures: the same ledger follows both, the plan on tensors without values."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from qlite.errors import ModelError
from qlite.memory import terms
from qlite.methods import METHODS
from qlite.model.shapes import base_shapes
from qlite.recipe.schema import Recipe
from qlite.training import forecast as module
from qlite.training.forecast import ANSWERS, ATTACH, EVALUATION, LOAD, OPTIMIZER_STEP, PHASES, STEP, forecast, trace, worst_workload
from qlite.training.planning import planned_and_measured
from tests.marks import slow
from tests.tiny import tiny_llama
from tests.tiny_run import run, tiny_recipe
from tests.tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer

SHAPE = {"num_hidden_layers": 7, "vocab_size": VOCAB_SIZE, "intermediate_size": 192}
HOST = {"saved_inputs": "host", "base": "host"}
CASES = {
    **{
        f"{bits} bit, {checkpointing}{', packed' if packing else ''}": {
            "base": {"bits": bits},
            "memory": {"checkpointing": checkpointing},
            "train": {"packing": packing},
        }
        for bits in (4, 8, 16)
        for checkpointing in ("block", "attention", "elementwise", "none")
        for packing in (False, True)
    },
    "vocabulary in 4 bit": {"base": {"embedding_bits": 4, "head_bits": 4}},
    "vocabulary in 8 bit": {"base": {"embedding_bits": 8, "head_bits": 8}},
    "float32": {"base": {"dtype": "float32", "bits": 16}},
    "dora": {"method": {"dora": True}},
    "pissa": {"method": {"init": "pissa"}, "base": {"bits": 8}},
    "loftq in rounds": {"method": {"init": "loftq", "loftq_rounds": 2}},
    "adalora": {"method": {"name": "adalora", "rank": 4, "start_rank": 6, "interval": 1, "start_share": 0.0, "final_share": 0.0}},
    "adalora, base on the host": {
        "method": {"name": "adalora", "rank": 4, "start_rank": 6, "start_share": 0.0, "final_share": 0.0},
        "memory": HOST,
    },
    "relora": {"method": {"name": "relora", "rank": 4, "resets": 1, "warmup": 0}},
    "relora, base on the host": {"method": {"name": "relora", "rank": 4, "resets": 1, "warmup": 0}, "memory": HOST},
    "low rank in the place of weights": {"method": {"name": "low_rank", "rank": 8}},
    "some targets": {"method": {"targets": ["q_proj", "v_proj"], "rank": 8}},
    "head and norms whole": {"method": {"modules_to_save": ["lm_head", "*layernorm"]}, "base": {"head_bits": 4}},
    "torch's optimizer": {"optimizer": {"name": "torch_adamw"}},
    "lion": {"optimizer": {"name": "lion8bit"}},
    "loss in chunks": {"memory": {"loss_chunk": 8}},
    "saved inputs on the host": {"memory": {"saved_inputs": "host"}},
    "saved inputs in 8 bit": {"memory": {"saved_inputs": "8bit"}},
    "MLP in parts": {"memory": {"mlp_chunk": 16}},
    "embedding on the host": {"memory": {"embedding": "host"}},
    "base on the host": {"memory": {"base": "host"}},
    "all together": {"memory": {**HOST, "mlp_chunk": 16, "embedding": "host"}, "base": {"embedding_bits": 8, "head_bits": 8}},
}


# In the default suite each storage, checkpointing and packing with some of the others, and all keys together; each alone with -m slow.
SLOW = {
    *("adalora, base on the host", "relora, base on the host", "loftq in rounds", "torch's optimizer", "float32", "vocabulary in 4 bit"),
    *("all together", "4 bit, none, packed", "16 bit, block, packed", "8 bit, attention"),
    "low rank in the place of weights",
    *("4 bit, attention", "4 bit, block, packed", "8 bit, block", "8 bit, attention, packed", "8 bit, none", "8 bit, none, packed"),
    *("16 bit, block", "16 bit, attention", "16 bit, none, packed", "some targets", "lion", "4 bit, attention, packed"),
    *(
        "head and norms whole",
        "MLP in parts",
        "loftq in rounds",
        "pissa",
        "relora",
        "adalora",
        "dora",
        "saved inputs in 8 bit",
        "saved inputs on the host",
        "base on the host",
        "loss in chunks",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder whose base has seven blocks, in bfloat16."""
    where = tmp_path_factory.mktemp("planned")
    tiny_llama(**SHAPE).bfloat16().save_pretrained(where / "base")
    tiny_tokenizer().save_pretrained(where / "base")
    rows = tiny_recipe_rows()
    for name, count in (("train.jsonl", 24), ("test.jsonl", 6)):
        (where / name).write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    return where


def tiny_recipe_rows() -> list[dict]:
    return [{"prompt": "abcdef"[: 1 + i % 6] * 4, "completion": "fedcba" * (2 + i % 5)} for i in range(24)]


def recipe_of(folder: Path, changes: dict, out: str = "run") -> Recipe:
    train = {"steps": 2, "accumulation": 2, "eval_every": 1, "exact_match_rows": 0, "tokens": 96, **changes.get("train", {})}
    memory = {"plan": "tell", **changes.get("memory", {})}
    return tiny_recipe(folder, **{**changes, "train": train, "memory": memory}, output={"dir": str(folder / out)})


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES])
def test_a_run_measures_what_was_planned(case, folder):
    recipe = recipe_of(folder, CASES[case], case.replace(" ", "_"))
    run(recipe)
    record = json.loads((Path(recipe.output.dir) / "memory.json").read_text())
    compared = {phase: (planned, measured) for phase, planned, measured in planned_and_measured(record)}
    assert {STEP, OPTIMIZER_STEP, EVALUATION} <= compared.keys()
    for phase in (STEP, OPTIMIZER_STEP, EVALUATION):
        planned, measured = compared[phase]
        assert abs(planned - measured) <= 0.01 * measured, phase
    planned, measured = (record[kind] for kind in ("planned", "measured"))
    for term in terms.LASTING:
        wanted, seen = (each.get("phases", each)[STEP]["terms"].get(term, 0) for each in (planned, measured))
        assert abs(wanted - seen) <= 1024, term  # a code table of bitsandbytes that layers share


@pytest.mark.parametrize("case", list(map(slow, ("4 bit, none", "8 bit, block, packed", "dora", "all together", "base on the host"))))
def test_a_few_blocks_say_what_all_take(case, folder):
    recipe = recipe_of(folder, {**CASES[case], "train": {**CASES[case].get("train", {}), "exact_match_rows": 5}})
    shapes, work = base_shapes(recipe.base, lambda *_: None), worst_workload(recipe)
    short, whole = forecast(recipe, shapes, work).peaks(), trace(recipe, shapes, work).peaks()
    assert list(short) == list(whole) == list(PHASES)
    for phase in PHASES:
        assert (short[phase].bytes, short[phase].host, short[phase].where) == (whole[phase].bytes, whole[phase].host, whole[phase].where)


@pytest.mark.parametrize(("case", "answers"), [slow("4 bit, block", (1, 2, 400)), slow("vocabulary in 8 bit", (60, 90, 2))])
def test_the_larger_of_two_things_is_not_drawn_as_one_line(case, answers, folder):
    """A vocabulary that outweighs few blocks and not all; a prompt's pass and a last token's that do."""
    recipe = recipe_of(folder, CASES[case])
    shapes = base_shapes(recipe.base, lambda *_: None)
    config = deepcopy(shapes.config)
    config.vocab_size, config.num_hidden_layers = 1024, 24
    shapes, work = replace(shapes, config=config), replace(worst_workload(recipe), answers=answers)
    short, whole = forecast(recipe, shapes, work), trace(recipe, shapes, work)
    for phase in PHASES:
        assert (phase, short.peaks()[phase].bytes) == (phase, whole.peaks()[phase].bytes)


@pytest.mark.parametrize("case", ["4 bit, block", *map(slow, ("8 bit, block", "16 bit, block", "vocabulary in 8 bit", "base on the host"))])
def test_loading_and_answering_are_what_was_planned(case, folder):
    # From its files: the plan does not count on the cache, from which a load takes no more.
    changes = {**CASES[case], "base": {**CASES[case].get("base", {}), "cache": False}}
    recipe = recipe_of(folder, {**changes, "train": {"exact_match_rows": 6, "answer_tokens": 40}}, f"{case} answered".replace(" ", "_"))
    run(recipe)
    record = json.loads((Path(recipe.output.dir) / "memory.json").read_text())
    compared = {phase: (planned, measured) for phase, planned, measured in planned_and_measured(record)}
    for phase in (LOAD, ATTACH, ANSWERS):
        planned, measured = compared[phase]
        assert abs(planned - measured) <= 0.01 * measured, phase


@pytest.mark.parametrize("attention", [slow("flash"), "flex"])
def test_attention_that_needs_a_card_is_planned_as_ours_and_cannot_be_kept(attention, folder):
    recipe = recipe_of(folder, {})
    asking = recipe.having({"base.attention": attention})
    shapes, work = base_shapes(recipe.base, lambda *_: None), worst_workload(recipe)
    assert forecast(asking, shapes, work).moments == forecast(recipe, shapes, work).moments
    with pytest.raises(ModelError, match=f'not for "{attention}"'):
        forecast(asking.having({"memory.checkpointing": "attention"}), shapes, work)


def test_the_work_of_a_few_blocks_says_that_of_all(folder):
    recipe = recipe_of(folder, {})
    shapes, work = base_shapes(recipe.base, lambda *_: None), worst_workload(recipe)
    short, whole = forecast(recipe, shapes, work).work, trace(recipe, shapes, work).work
    assert (short.flops, short.bytes, short.kernels) == (whole.flops, whole.bytes, whole.kernels)
    assert whole.flops > 0


@pytest.mark.parametrize(
    "changes",
    [slow({"method": {"rank_per_target": {"model.layers.2.*": 8}}}), {"method": {"targets": ["model.layers.1.*", "model.layers.4.*"]}}],
    ids=["ranks", "targets"],
)
def test_a_model_whose_blocks_differ_is_traced_whole(changes, folder, monkeypatch):
    recipe = recipe_of(folder, changes)
    shapes, work = base_shapes(recipe.base, lambda *_: None), worst_workload(recipe)
    counts = []
    monkeypatch.setattr(
        module, "trace", lambda recipe, shapes, work: counts.append(shapes.config.num_hidden_layers) or trace(recipe, shapes, work)
    )
    found = forecast(recipe, shapes, work)
    assert counts == [7]
    assert found.peaks()[STEP].bytes == trace(recipe, shapes, work).peaks()[STEP].bytes


def test_blocks_at_the_bottom_may_be_others_than_all_above(folder, monkeypatch):
    """LLaMA-Adapter's first two blocks have no prompts."""
    recipe = replace(recipe_of(folder, {}), method=METHODS["llama_adapter"](length=5))
    shapes = base_shapes(recipe.base, lambda *_: None)
    config = deepcopy(shapes.config)
    config.num_hidden_layers = 9
    shapes, work, counts = replace(shapes, config=config), worst_workload(recipe), []
    monkeypatch.setattr(
        module, "trace", lambda recipe, shapes, work: counts.append(shapes.config.num_hidden_layers) or trace(recipe, shapes, work)
    )
    found = forecast(recipe, shapes, work)
    assert counts == [5, 6]
    for phase, peak in trace(recipe, shapes, work).peaks().items():
        # A process's first trace finds two code tables of bitsandbytes, 1 KiB each, that later ones have already.
        assert found.peaks()[phase].bytes - peak.bytes in (0, 2048), phase


@pytest.mark.slow
def test_patterns_of_blocks_that_repeat_are_drawn_on(folder, monkeypatch):
    """Every other block has a sliding window, as in Gemma 2: whole periods are traced."""
    from transformers import Qwen2Config

    kinds = ["sliding_attention", "full_attention"] * 5
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=10, num_attention_heads=4, num_key_value_heads=2,
        layer_types=kinds, use_sliding_window=True, sliding_window=16,
    )  # fmt: skip
    recipe = recipe_of(folder, {})
    shapes = replace(base_shapes(recipe.base, lambda *_: None), config=config)
    work = worst_workload(recipe)
    counts = []
    monkeypatch.setattr(
        module, "trace", lambda recipe, shapes, work: counts.append(shapes.config.num_hidden_layers) or trace(recipe, shapes, work)
    )
    found = forecast(recipe, shapes, work)
    assert counts == [4, 6]
    whole = trace(recipe, shapes, work)
    assert {phase: peak.bytes for phase, peak in found.peaks().items()} == {phase: peak.bytes for phase, peak in whole.peaks().items()}


def test_answers_are_planned_with_their_cache(folder):
    changes = {"train": {"exact_match_rows": 4, "answer_tokens": 200}}
    recipe = recipe_of(folder, changes)
    peak = forecast(recipe, base_shapes(recipe.base, lambda *_: None), worst_workload(recipe)).peaks()[ANSWERS]
    heads, size, tokens = 2, 16, recipe.train.tokens + 200
    assert peak.terms[terms.CACHE] >= 7 * 2 * 4 * heads * size * 2 * (tokens - 2)


@pytest.mark.slow
def test_nothing_of_a_traced_run_has_a_value(folder):
    """A plan of a model that no machine holds: if anything were computed, 40 GB would be needed."""
    recipe = recipe_of(folder, {})
    shapes = base_shapes(recipe.base, lambda *_: None)
    size = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "head_dim": 128}
    config = type(shapes.config)(**{**shapes.config.to_dict(), **size, "num_key_value_heads": 8, "vocab_size": 128256})
    found = forecast(recipe, replace(shapes, config=config), worst_workload(recipe)).peaks()[STEP]
    assert found.bytes > 34e9
