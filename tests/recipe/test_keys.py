"""--keys shows every key there is, each with a meaning; a new key is added to the list below on purpose."""

import contextlib
import io

import pytest

from qlite.methods import METHODS
from qlite.recipe.keys import all_keys, describe, print_keys, toml_value

# fmt: off
METHOD_KEYS = {
    "lora": [
        "rank", "alpha", "dropout", "targets", "rank_per_target", "alpha_per_target", "rslora", "dora", "b_lr_ratio", "init",
        "loftq_rounds", "modules_to_save", "trained_tokens", "new_tokens",
    ],
    "ia3": ["targets", "feedforward"],
    "bottleneck": ["width", "placement", "activation", "attention_output", "mlp_output"],
    "full": [],
    "galore": ["rank", "update_every", "scale", "targets"],
    "adalora": [
        "rank", "start_rank", "alpha", "dropout", "targets", "orthogonality", "betas", "start_share", "final_share", "interval",
    ],
    "relora": ["rank", "alpha", "dropout", "targets", "resets", "warmup", "pruned"],
    "low_rank": ["rank", "targets", "init"],
    "prefix": ["length", "hidden"],
    "prompt": ["length", "text"],
    "llama_adapter": ["length", "first_block", "gate"],
    "llama_adapter_v2": ["length", "first_block", "gate", "targets"],
}
ALL_KEYS = [
    "base.model", "base.revision", "base.sha256", "base.bits", "base.embedding_bits", "base.head_bits", "base.quant_type",
    "base.double_quant", "base.block_size", "base.dtype", "base.attention", "base.cache", "base.fused",
    *[f"method.{key}" for name in METHODS for key in ["name", *METHOD_KEYS[name]]],
    "optimizer.name", "optimizer.lr", "optimizer.weight_decay", "optimizer.betas", "optimizer.eps",
    "schedule.name", "schedule.warmup_steps", "schedule.final_ratio",
    "data.train", "[[data.train]].path", "[[data.train]].name", "[[data.train]].split", "[[data.train]].revision",
    "[[data.train]].stream", "[[data.train]].rows", "[[data.train]].separator", "[[data.train]].weight", "[[data.train]].format",
    "[[data.train]].columns", "[[data.train]].roles",
    "data.test", "data.held_out_rows", "data.split", "data.revision", "data.format", "data.columns", "data.roles", "data.separator",
    "data.system", "data.template", "data.loss_on", "data.long_rows", "data.stride", "data.bad_rows", "data.allow",
    "train.steps", "train.epochs", "train.micro_batch", "train.accumulation", "train.tokens", "train.packing",
    "train.clip_norm", "train.max_skipped", "train.spike_factor",
    "train.seed", "train.eval_every", "train.patience", "train.exact_match_rows", "train.answer_tokens",
    "train.samples",
    "memory.plan", "memory.budget",
    "memory.checkpointing", "memory.loss_chunk", "memory.saved_inputs", "memory.mlp_chunk", "memory.embedding", "memory.base",
    "parallel.device", "parallel.threads",
    "output.dir", "output.save_every", "output.keep", "output.on_full_disk", "output.adapter", "output.loggers",
]
# fmt: on


def printed(monkeypatch, columns: int) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_keys()
    return out.getvalue()


def test_these_are_all_the_keys():
    assert [key.name for key in all_keys()] == ALL_KEYS
    assert len(set(ALL_KEYS) - {f"method.{key}" for keys in METHOD_KEYS.values() for key in keys}) == 80


@pytest.mark.parametrize("key", list(all_keys()), ids=lambda key: key.name)
def test_key_is_documented_in_a_sentence(key):
    assert len(key.text) >= 20
    assert key.text.endswith(".")
    assert key.takes
    assert not (key.must_be_given and key.default)


def test_two_keys_must_be_given_and_the_path_of_a_source():
    assert [key.name for key in all_keys() if key.must_be_given] == ["base.model", "data.train", "[[data.train]].path"]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_all_keys_are_printed_at_any_width(monkeypatch, columns):
    text = printed(monkeypatch, columns)
    assert all(len(line) <= columns for line in text.splitlines())
    letters = "".join(text.split())  # a word longer than the screen is broken
    for key in all_keys():
        default = "" if key.default is None else f"={key.default}"
        assert "".join(f"{key.name}{default}{key.takes.removeprefix('a ')}".split()) in letters
        assert "".join(key.text.split()) in letters
    for table in ("base", "method", "optimizer", "schedule", "data", "train", "memory", "parallel", "output"):
        assert f"[{table}]" in letters


def test_default_and_what_a_key_takes_stand_beside_it(monkeypatch):
    text = printed(monkeypatch, 120)
    for line in (
        "  base.model   text; must be given",
        "  train.steps   whole number, 1 or more; none by default",
        "  train.micro_batch = 1   whole number, 1 or more",
        '  schedule.name = "cosine"   "constant", "linear" or "cosine"',
        "  optimizer.betas = [0.9, 0.999]   list of 2 numbers, 0 or more and less than 1",
        "  method.targets = \"all-linear\"   text or a list of texts",
        "  method.rank_per_target = {}   table of whole numbers, 1 or more",
        "  base.double_quant = true   true or false",
    ):  # fmt: skip
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"type": "integer", "minimum": 0}, "a whole number, 0 or more"),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, "a number, more than 0 and less than 1"),
        ({"type": "number", "maximum": 1}, "a number, 1 or less"),
        ({"type": "boolean"}, "true or false"),
        ({"enum": ["a"], "type": "string"}, '"a"'),
        ({"enum": [1, 2, 3], "type": "integer"}, "1, 2 or 3"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text"),
    ],
)
def test_what_a_key_takes_is_said_in_words(entry, words):
    assert describe(entry) == words


def test_values_are_shown_as_a_recipe_has_them():
    values = [True, 3, 1e-08, "a\"b", ["x", 1], {"q_proj": 4, "a.b": [1]}, None, (0.9, 0.999), float("inf"), 2**70]  # fmt: skip
    assert [toml_value(value) for value in values] == [
        "true",
        "3",
        "1e-08",
        '"a\\"b"',
        '["x", 1]',
        '{q_proj = 4, "a.b" = [1]}',
        "none",
        "[0.9, 0.999]",
        "inf",
        "0x400000000000000000",
    ]


def test_that_several_methods_may_be_named_is_said_where_the_name_is(monkeypatch):
    key = next(key for key in all_keys() if key.name == "method.name")
    assert key.takes.endswith(', "full" or "galore", or a list of several')
    assert 'name = ["lora", "prefix"], each has its keys in a table of its own: [method.lora].' in key.text
    assert " ".join(printed(monkeypatch, 120).split()).count('["lora", "prefix"]') == 1
