"""Every shipped recipe reads, says what it is for, and plans to fit the card in its name."""

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from qlite.memory import terms
from qlite.memory.plan import VISIBLE_SHARE, MemoryPlan
from qlite.model.shapes import base_shapes
from qlite.recipe.read import read_recipe
from qlite.training.forecast import STEP, Workload, forecast, worst_workload

ROOT = Path(__file__).resolve().parent.parent
OWN = sorted((ROOT / "recipes").glob("*.toml"))
BASELINES = sorted((ROOT / "recipes" / "baselines").glob("*.toml"))
RECIPES = [*OWN, *BASELINES]
CARDS = [path for path in RECIPES if re.search(r"_\d+gb$", path.stem)]
GIB = 1024**3


def test_these_are_all_the_recipes():
    assert [path.stem for path in OWN] == [
        "e2e",
        "instruct",
        "llama13b_24gb",
        "llama3b_6gb",
        "llama7b_24gb",
        "llama8b_12gb",
        "llama8b_16gb",
        "llama8b_8gb",
        "mistral7b_12gb",
        "quickstart",
        "qwen0.5b_4gb",
        "qwen14b_16gb",
        "qwen4b_8gb",
        "qwen7b_12gb",
        "seed_tasks",
        "sgd",
        "snips",
    ]
    assert len(CARDS) == 11
    relatives = "adalora bottleneck dora full galore ia3 llama_adapter llama_adapter_v2 loftq lora lora_bottleneck lora_ia3 lora_plus "
    relatives += "lora_prefix low_rank pissa prefix prompt relora rslora"
    assert [path.stem for path in BASELINES] == relatives.split()


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_is_the_quickstart_with_another_method(path):
    """So that a table of methods is a loop over files: all else that decides is the same, but the storage where weights are trained."""
    own, quickstart = read_recipe(path), read_recipe(ROOT / "recipes" / "quickstart.toml")
    names = ["_".join(part.name for part in own.method.each), getattr(own.method, "init", None)]
    names += [key for key in ("dora", "rslora") if getattr(own.method, key, False)]
    assert path.stem in [*names, *(["lora_plus"] if getattr(own.method, "b_lr_ratio", 1) != 1 else [])]
    assert not own.method.trains_base or own.base.bits == 16
    same = replace(own.base, bits=quickstart.base.bits), replace(own.optimizer, lr=quickstart.optimizer.lr)
    assert same == (quickstart.base, quickstart.optimizer)
    for table in ("schedule", "data", "train", "memory", "parallel"):
        assert getattr(own, table) == getattr(quickstart, table)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_reads_and_opens_with_one_or_two_lines_of_comment(path):
    recipe = read_recipe(path)
    assert recipe.output.dir == f"runs/{path.stem}"
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert 1 <= len(comment) <= 2
    assert lines[: len(comment)] == comment
    assert all(len(line) <= 125 for line in lines)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_of_a_wheel_gives_its_checksum(path):
    base = read_recipe(path).base
    if base.model.startswith("pypi:"):
        assert re.fullmatch("[0-9a-f]{64}", base.sha256)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_of_a_gated_model_says_how_to_log_in(path):
    recipe, text = read_recipe(path), path.read_text(encoding="utf-8")
    is_gated = recipe.base.model.startswith(("meta-llama/", "mistralai/"))
    assert ("hf auth login" in text) == is_gated
    assert (f"huggingface.co/{recipe.base.model} " in text) == is_gated


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_of_a_base_model_without_a_chat_template_names_one(path):
    recipe = read_recipe(path)
    assert (recipe.data.template == "auto") == ("nstruct" in recipe.base.model)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_recipe_for_a_card_saves_memory_where_it_can(path):
    recipe = read_recipe(path)
    assert (recipe.base.bits, recipe.base.quant_type, recipe.base.double_quant) == (4, "nf4", True)
    assert recipe.memory.checkpointing == "auto"
    assert recipe.optimizer.name == ("adamw" if path.stem == "llama7b_24gb" else "paged_adamw8bit")
    assert recipe.data.held_out_rows
    assert str(int(re.search(r"_(\d+)gb$", path.stem)[1])) + " GB card" in path.read_text(encoding="utf-8")


def test_alpaca_recipe_is_the_original_run():
    """tloen/alpaca-lora, finetune.py: its defaults, with 512 tokens as in its README, and 5 epochs."""
    recipe = read_recipe(ROOT / "recipes" / "llama7b_24gb.toml")
    assert recipe.train.micro_batch == 4
    assert recipe.train.micro_batch * recipe.train.accumulation == 128
    assert (recipe.method.rank, recipe.method.alpha, recipe.method.dropout) == (8, 16, 0.05)
    assert recipe.method.targets == ("q_proj", "v_proj")
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.weight_decay) == ("adamw", 3e-4, 0)
    assert (recipe.schedule.name, recipe.schedule.warmup_steps) == ("linear", 100)
    assert (recipe.train.tokens, recipe.train.epochs) == (512, 5)
    assert (recipe.data.train, recipe.data.template, recipe.data.held_out_rows) == ("tatsu-lab/alpaca", "alpaca", 2000)


def test_recipes_state_few_defaults():
    """A key that repeats its default is noise, but for those that a reader looks for."""
    wanted = {"base.bits", "base.quant_type", "base.double_quant", "optimizer.lr", "method.rank", "method.alpha", "schedule.name"}
    wanted |= {"train.micro_batch", "train.accumulation", "train.tokens", "method.name", "method.width"}
    for path in RECIPES:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        recipe = read_recipe(path)
        if isinstance(tables.get("method", {}).get("name"), list):
            own = tables.pop("method")
            parts = [("method", own.get(part.name, {}), part) for part in recipe.method.each]
        else:
            parts = []
        for table, values, made in [*parts, *((table, values, getattr(recipe, table)) for table, values in tables.items())]:
            fields = type(made).__dataclass_fields__
            noise = {f"{table}.{key}" for key, value in values.items() if key in fields and fields[key].default == value}
            assert noise <= wanted, path.stem


# The promise in the name


# A small and a large card; the others' plans, 20 s each, with -m slow.
PLANNED = {"llama8b_8gb", "llama7b_24gb"}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem in PLANNED else [pytest.mark.slow]) for path in CARDS],
    ids=[path.stem for path in CARDS],
)
def test_recipe_plans_to_fit_its_card_with_a_twentieth_to_spare(path):
    recipe, card = read_recipe(path), int(re.search(r"_(\d+)gb$", path.stem)[1]) * GIB
    shapes = base_shapes(recipe.base, lambda *_: None)
    found = forecast(recipe, shapes, worst_workload(recipe)).peaks()
    plan = MemoryPlan.on_card(found, int(VISIBLE_SHARE * card), path.stem)
    assert plan.headroom >= 0.05 * card, str(plan)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_can_be_planned_before_anything_is_fetched(path, monkeypatch):
    monkeypatch.setattr("qlite.model.shapes.cached", lambda model, revision: None)
    shapes = base_shapes(read_recipe(path).base, lambda *_: None)
    assert "table of usual models" in shapes.origin


@pytest.mark.slow
def test_plan_gives_the_field_notes_floor_for_llama_8b():
    """Base, constants, embedding and head: 5.31 GiB, or 3.86 with the vocabulary in 4 bit, too (section 3c of the notes on the field).

    Beyond what is stored, our own plan has one decoder block's constants in float32 (qlite/quant/constants.py).
    """
    a_blocks_constants = 4 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) / 64
    for keys, expected in (([], 5.31), (["base.embedding_bits=4", "base.head_bits=4"], 3.86)):
        recipe = read_recipe(ROOT / "recipes" / "llama8b_8gb.toml", keys)
        peak = forecast(recipe, base_shapes(recipe.base, lambda *_: None), Workload(worst_workload(recipe).train)).peaks()[STEP]
        lasting = sum(peak.terms.get(term, 0) for term in (terms.BASE, terms.CONSTANTS, terms.VOCABULARY, terms.REST))
        assert (lasting - a_blocks_constants) / GIB == pytest.approx(expected, abs=0.01)


# tools/snips_rows.py, which writes what snips.toml reads


def snips_rows(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "snips_rows.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


def test_snips_rows_are_read_as_the_note_on_the_data_says(tmp_path):
    piece = [{"text": "play\t"}, {"text": " Ça va ", "entity": "track"}, {"text": "by "}, {"text": "Zoé", "entity": "artist"}]
    twice = [{"text": "a", "entity": "artist"}, {"text": " and "}, {"text": "b", "entity": "artist"}]
    rows = json.dumps({"PlayMusic": [{"data": piece}, {"data": twice}]}, ensure_ascii=False)
    # UTF-8 with one byte of Latin-1, as in the real file.
    (tmp_path / "train_PlayMusic_full.json").write_bytes(rows.encode().replace("Zoé".encode(), b"Zo\xe9"))
    (tmp_path / "validate_PlayMusic.json").write_text(json.dumps({"PlayMusic": [{"data": twice}]}), encoding="utf-8")
    done = snips_rows(tmp_path, "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "snips_train.jsonl: 1 rows" in done.stdout
    (row,) = map(json.loads, (tmp_path / "snips_train.jsonl").read_text(encoding="utf-8").splitlines())
    assert [message["content"] for message in row["messages"]] == [
        "Give the intent and slots as JSON.",
        "play Ça va by Zoé",
        '{"intent":"PlayMusic","slots":{"track":"Ça va","artist":"Zoé"}}',
    ]
    (test,) = map(json.loads, (tmp_path / "snips_test.jsonl").read_text(encoding="utf-8").splitlines())
    assert test["messages"][2]["content"] == '{"intent":"PlayMusic","slots":{"artist":["a","b"]}}'


def test_snips_rows_refuses_a_folder_without_the_data(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        done = snips_rows(folder, "--out", tmp_path)
        assert done.returncode == 2
        assert str(folder) in done.stderr
        assert "Traceback" not in done.stderr
