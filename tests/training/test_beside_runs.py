"""Runs of what stands beside attention and input: planned, stopped, gone on with, lowered, opened, exported; or refused with a reason."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlite.data.encode import Encoded
from qlite.errors import DataError, ExportError, NotMergeable, RecipeError
from qlite.evaluate import Material, require_room
from qlite.export import export
from qlite.formats.peft import CONFIG, PEFT, WEIGHTS, read_tensors
from qlite.generate import generate
from qlite.recipe.read import build_recipe
from qlite.recipe.schema import Recipe
from qlite.serving.answer import Sampling, answer_batch
from qlite.serving.dialogue import Dialogue
from qlite.training.forecast import EVALUATION, OPTIMIZER_STEP, STEP
from qlite.training.merging import Merge
from qlite.training.planning import planned_and_measured
from tests.marks import slow
from tests.tiny import tiny_llama
from tests.tiny_run import opened_run, run, tiny_tables
from tests.tiny_tokenizer import VOCAB_SIZE

CASES = {
    "prefix": {"name": "prefix", "length": 5, "hidden": 8},
    "prompt": {"name": "prompt", "length": 5, "text": "abc"},
    "llama_adapter": {"name": "llama_adapter", "length": 5, "first_block": 1, "gate": "block"},
    "llama_adapter_v2": {"name": "llama_adapter_v2", "length": 5, "first_block": 1},
    "lora + llama_adapter": {"name": ["lora", "llama_adapter"], "lora": {"rank": 4}, "llama_adapter": {"first_block": 1}},
    "lora + prefix": {"name": ["prefix", "lora"], "prefix": {"hidden": 0}, "lora": {"rank": 4, "dropout": 0.1}},
    "lora + prompt": {"name": ["lora", "prompt"], "lora": {"rank": 4, "trained_tokens": [5]}, "prompt": {}},
}
LOWERED = {"saved_inputs": "host", "base": "host", "embedding": "host", "mlp_chunk": 16}
SHORT = Sampling(max_tokens=12)
QUICK = {"exact_match_rows": 0, "eval_every": 0}
QLITES_OWN = "; generate, chat and evaluate answer with it as it is, and it has no form for other programs$"
WITH_PEFT = ("prefix", "prompt", "llama_adapter")


def recipe_of(folder: Path, case: str, **changes: dict) -> Recipe:
    tables = tiny_tables(folder, **{"train": QUICK, **changes})
    return build_recipe({**tables, "method": CASES[case]}, "tiny.toml")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Callable[[str], Path]:
    """Returns the folder of a finished run of a case, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("beside")

    def folder_of(case: str) -> Path:
        if not (folder / case).exists():
            (folder / case).mkdir()
            run(recipe_of(folder / case, case))
        return folder / case

    return folder_of


# In the default suite the two that others build on; the rest with -m slow.
FIRST = ("prefix", "prompt")
cases = pytest.mark.parametrize("case", [case if case in FIRST else slow(case) for case in CASES])


@cases
def test_stopped_it_goes_on_to_the_same_bytes(case, done, tmp_path):
    recipe = recipe_of(tmp_path, case)
    run(recipe, stop_after=3)
    run(recipe)
    found, want = (read_tensors(folder / "run" / "adapter") for folder in (tmp_path, done(case)))
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())


MOVED = {
    "lowered": {"memory": LOWERED},
    "checkpointed": {"memory": {"checkpointing": "attention"}},
    "packed": {"train": {**QUICK, "packing": True}},
}


@pytest.mark.parametrize(
    ("case", "keys"),
    [(case, keys) if keys == "packed" and case in FIRST else slow(case, keys) for case in CASES for keys in MOVED],
)
def test_a_run_measures_what_was_planned(case, keys, tmp_path):
    changes = {**MOVED[keys], "memory": {"plan": "tell", **MOVED[keys].get("memory", {})}}
    changes["train"] = {**QUICK, "steps": 2, **changes.get("train", {})}
    run(recipe_of(tmp_path, case, **changes))
    record = json.loads((tmp_path / "run" / "memory.json").read_text())
    compared = {phase: (planned, measured) for phase, planned, measured in planned_and_measured(record)}
    assert {STEP, OPTIMIZER_STEP, EVALUATION} <= compared.keys()
    for phase in (STEP, OPTIMIZER_STEP, EVALUATION):
        planned, measured = compared[phase]
        # 2 KiB: code tables of bitsandbytes, which layers share; beside a model this small they are more than a hundredth.
        assert abs(planned - measured) <= max(0.01 * measured, 2048), phase


@cases
def test_what_only_moves_or_is_computed_again_changes_no_byte(case, done, tmp_path):
    run(recipe_of(tmp_path, case, memory={**LOWERED, "mlp_chunk": 0}))
    found, want = (read_tensors(folder / "run" / "adapter") for folder in (tmp_path, done(case)))
    assert all(torch.equal(found[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize("table", [{"name": "prompt", "length": 40}, {"name": ["lora", "prompt"], "prompt": {"length": 40}}], ids=str)
def test_rows_that_a_prompt_would_push_beyond_the_models_positions_are_refused(table, tmp_path):
    parts = tiny_tables(tmp_path, train=QUICK)
    tiny_llama(vocab_size=VOCAB_SIZE, max_position_embeddings=100).save_pretrained(tmp_path / "base")
    limits = "train.tokens = 64: the model reads 100 positions at most, and 40 of them are the prompt's"
    with pytest.raises(RecipeError) as caught:
        run(build_recipe({**parts, "method": table}, "tiny.toml"))
    assert caught.value.problems == [f"{limits}; set train.tokens = 60, or lower its length"]
    parts["train"] = parts["train"] | {"tokens": 60, "steps": 1}
    run(build_recipe({**parts, "method": table, "schedule": {}}, "tiny.toml"))


@cases
def test_answers_of_a_batch_are_those_of_each_prompt_alone(case, done):
    opened = opened_run(done(case))
    prompts = [opened.encoder.encode_prompt([{"role": "user", "content": text}]) for text in ("abc", "fedcba", "a")]
    together, *alone = (answer_batch(opened.base.model, opened.encoder, asked, SHORT) for asked in (prompts, *([each] for each in prompts)))
    assert together == [answer for (answer,) in alone]
    assert len(set(map(len, prompts))) == 3
    assert generate(done(case) / "run", "fedcba", sampling=SHORT, quiet=True)[0] == together[1]


def test_rows_that_do_not_fit_behind_the_prompt_are_not_measured(done):
    """Its 5 vectors stand in the first of the positions that the config says."""
    opened = opened_run(done("prompt"))
    material = Material([(Encoded([5] * 60, [True] * 60), "test.jsonl:1")], [], [])
    opened.base.model.config.max_position_embeddings = 65
    require_room(opened, material, ["loss"], SHORT)
    opened.base.model.config.max_position_embeddings = 64
    with pytest.raises(DataError, match="test.jsonl:1: has 60 tokens, and the model reads 59 at most"):
        require_room(opened, material, ["loss"], SHORT)


@pytest.mark.parametrize("case", ["prompt", "prefix"])
def test_a_conversation_reads_what_it_has_said(case, done):
    opened = opened_run(done(case))
    talk, again = (Dialogue(opened.base.model, opened.encoder, SHORT, None) for _ in range(2))
    for message in ("abc", "def", "fa"):
        said = talk.ask(message, lambda _: None).text
        again._read.forget()
        assert again.ask(message, lambda _: None).text == said


@cases
def test_no_weight_can_say_it_so_merging_is_refused(case, done, tmp_path):
    way = "; --adapter writes it as PEFT's files$" if case in WITH_PEFT else QLITES_OWN
    with pytest.raises(NotMergeable, match=f"is no weight of the base model{way}"):
        export(done(case) / "run", merge=Merge(rows=0), out=tmp_path / "merged", quiet=True)
    with pytest.raises(NotMergeable, match=way):
        export(done(case) / "run", gguf="f16", out=tmp_path / "gguf", quiet=True)
    with pytest.raises(ExportError, match=f"llama.cpp.*{way}"):
        export(done(case) / "run", adapter="gguf", out=tmp_path / "gguf", quiet=True)
    assert not list(tmp_path.iterdir())


@cases
def test_the_adapter_is_exported_where_peft_has_its_type(case, done, tmp_path):
    if case not in WITH_PEFT:
        with pytest.raises(ExportError, match=f"PEFT has no adapter.*{QLITES_OWN}"):
            export(done(case) / "run", adapter="peft", out=tmp_path / "peft", quiet=True)
        return
    export(done(case) / "run", adapter="peft", out=tmp_path / "peft", quiet=True)
    assert {file.name for file in (tmp_path / "peft").iterdir()} >= {WEIGHTS, CONFIG, "README.md"}
    adapter = done(case) / "run" / "adapter"
    assert json.loads((adapter / PEFT / CONFIG).read_text())["peft_type"] in ("PREFIX_TUNING", "PROMPT_TUNING", "ADAPTION_PROMPT")
    base = AutoModelForCausalLM.from_pretrained(done(case) / "base", dtype=torch.float32)
    assert peft.PeftModel.from_pretrained(base, tmp_path / "peft")(input_ids=torch.arange(3, 9).unsqueeze(0)).logits.isfinite().all()
    if case == "prefix":  # without the MLP that made it
        assert (tmp_path / "peft" / WEIGHTS).stat().st_size < (adapter / WEIGHTS).stat().st_size


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ({"name": "prompt", "length": 2, "text": "abcdef"}, "set method.length = "),
        ({"name": "prompt", "length": 2, "text": [4000]}, "token 4000 has no row"),
        ({"name": "llama_adapter", "first_block": 2}, "this model has 2 blocks"),
        ({"name": ["prefix", "llama_adapter"], "prefix": {}, "llama_adapter": {"first_block": 0}}, "has one place"),
    ],
)
def test_what_cannot_be_is_said_before_a_step(method, problem, tmp_path):
    tables = tiny_tables(tmp_path)
    with pytest.raises(RecipeError, match=problem):
        run(build_recipe({**tables, "method": method}, "tiny.toml"))
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_another_attention_has_no_place_beside_it(tmp_path):
    with pytest.raises(RecipeError, match='set base.attention = "auto"'):
        run(recipe_of(tmp_path, "prefix", base={"attention": "eager"}))
