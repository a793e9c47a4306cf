"""Every shipped recipe reads, says what it is for, and fits the card in its name by the arithmetic below."""

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlite.recipe.read import read_recipe
from qlite.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
CARDS = [path for path in RECIPES if re.search(r"_\d+gb$", path.stem)]
GIB = 1024**3


def test_these_are_all_the_recipes():
    assert [path.stem for path in RECIPES] == [
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
    assert recipe.memory.checkpointing == "block"
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
    wanted = {"base.bits", "base.quant_type", "base.double_quant", "method.rank", "method.alpha", "schedule.name"}
    wanted |= {"train.micro_batch", "train.accumulation", "train.tokens"}
    for path in RECIPES:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        recipe = read_recipe(path)
        for table, values in tables.items():
            fields = type(getattr(recipe, table)).__dataclass_fields__
            noise = {f"{table}.{key}" for key, value in values.items() if fields[key].default == value}
            assert noise <= wanted, path.stem


# The promise in the name


@dataclass(frozen=True)
class Shape:
    """What a model's config.json says: L layers, D hidden, I intermediate, V vocabulary, widths of queries and of keys."""

    L: int
    D: int
    I: int  # noqa: E741
    V: int
    queries: int
    keys: int
    is_tied: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear of a block."""
        D, I = self.D, self.I  # noqa: E741
        attention = {"q_proj": (D, self.queries), "k_proj": (D, self.keys), "v_proj": (D, self.keys), "o_proj": (self.queries, D)}
        return attention | {"gate_proj": (D, I), "up_proj": (D, I), "down_proj": (I, D)}


SHAPES = {
    "huggyllama/llama-7b": Shape(32, 4096, 11008, 32000, 4096, 4096),
    "meta-llama/Llama-2-13b-hf": Shape(40, 5120, 13824, 32000, 5120, 5120),
    "meta-llama/Llama-3.1-8B-Instruct": Shape(32, 4096, 14336, 128256, 4096, 1024),
    "meta-llama/Llama-3.2-3B-Instruct": Shape(28, 3072, 8192, 128256, 3072, 1024, is_tied=True),
    "mistralai/Mistral-7B-Instruct-v0.3": Shape(32, 4096, 14336, 32768, 4096, 1024),
    "Qwen/Qwen2.5-0.5B-Instruct": Shape(24, 896, 4864, 151936, 896, 128, is_tied=True),
    "Qwen/Qwen2.5-7B-Instruct": Shape(28, 3584, 18944, 152064, 3584, 512),
    "Qwen/Qwen2.5-14B-Instruct": Shape(48, 5120, 13824, 152064, 5120, 1024),
    "Qwen/Qwen3-4B-Instruct-2507": Shape(36, 2560, 9728, 151936, 4096, 1024, is_tied=True),
}
CUDA_CONTEXT_BYTES = 0.8 * GIB


def needed_bytes(recipe: Recipe, shape: Shape) -> float:
    """Return the memory at the peak of a training step, each term rounded up rather than down."""
    tokens = recipe.train.micro_batch * recipe.train.tokens
    # NF4, blocks of 64, double quantisation: 1/2 + 1/64 + 4/(64 * 256) bytes a weight. Embedding and head stay bfloat16.
    weights = shape.L * sum(i * o for i, o in shape.linears.values())
    base = weights * (1 / 2 + 1 / 64 + 4 / 16384) + shape.V * shape.D * 2 * (1 if shape.is_tied else 2)
    chosen = shape.linears if recipe.method.targets == "all-linear" else {k: shape.linears[k] for k in recipe.method.targets}
    # A trained parameter: bfloat16 2, remainder 2, float32 gradient 4, float32 master during the step 4; Adam's 2 or 8.
    state = 2 if "8bit" in recipe.optimizer.name else 8
    lora = shape.L * recipe.method.rank * sum(i + o for i, o in chosen.values()) * (2 + 2 + 4 + 4 + state)
    block_inputs = shape.L * tokens * shape.D * 2
    # One block in its backward pass: 4 tensors of width I saved and as many in flight, two float32 norms, attention's
    # four; and its largest weight, dequantised.
    block = tokens * (16 * shape.I + 24 * shape.D) + shape.D * shape.I * 2
    # Or the loss: three float32 and one bfloat16 tensor of a chunk's logits; hidden states and their gradient.
    loss = min(recipe.memory.loss_chunk, tokens) * shape.V * 14 + tokens * shape.D * 4
    return base + lora + block_inputs + max(block, loss) + CUDA_CONTEXT_BYTES


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_recipe_needs_nine_tenths_of_its_card_at_most(path):
    recipe = read_recipe(path)
    card_bytes = int(re.search(r"_(\d+)gb$", path.stem)[1]) * GIB
    assert needed_bytes(recipe, SHAPES[recipe.base.model]) <= 0.9 * card_bytes


def test_arithmetic_gives_the_field_notes_floor_for_llama_8b():
    recipe = read_recipe(ROOT / "recipes" / "llama8b_8gb.toml", ["train.tokens=2", "method.rank=1", "memory.loss_chunk=1"])
    shape = SHAPES[recipe.base.model]
    assert needed_bytes(recipe, shape) / GIB == pytest.approx(5.31 + 0.8 + 0.14, abs=0.02)


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
