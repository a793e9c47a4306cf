"""An adapter says where it is from, and over what it was not trained on it is not loaded, or only with a word of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlite.errors import AdapterError
from qlite.export import main as export
from qlite.formats.peft import WEIGHTS
from qlite.hashes import sampled_hash
from qlite.recipe.read import build_recipe
from qlite.training.open_run import open_run
from qlite.training.provenance import KEY, other_base, read_provenance
from qlite.training.run_folder import RunFolder
from tests.tiny_run import run, tiny_recipe
from tools.merge import main as merge


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run, its base and its rows in one folder."""
    folder = tmp_path_factory.mktemp("provenance")
    run(tiny_recipe(folder, train={"steps": 2, "exact_match_rows": 0, "eval_every": 0}))
    return folder


@pytest.fixture
def mine(trained, tmp_path) -> Path:
    """A copy of it to be changed, whose recipe names its own base."""
    folder = tmp_path / "mine"
    shutil.copytree(trained, folder)
    path = folder / "run" / "recipe.toml"
    path.write_text(path.read_text().replace(str(trained), str(folder)))
    return folder


def opened(folder: Path, notes: list[str] | None = None):
    return open_run(RunFolder(folder / "run"), "cpu", lambda *_: None, (notes if notes is not None else []).append)


def change_base(folder: Path) -> None:
    weights = folder / "base" / "model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def test_the_adapter_says_base_storage_template_tokenizer_rows_recipe_and_versions_and_no_path(trained):
    with safe_open(trained / "run" / "adapter" / WEIGHTS, "pt") as file:
        text = file.metadata()[KEY]
    said = json.loads(text)
    weights = trained / "base" / "model.safetensors"
    facts = {"bytes": weights.stat().st_size, "sampled": sampled_hash([weights], with_names=False)}
    assert said["base"]["name"] == "base"
    assert said["base"]["files"].keys() == {"config.json", "model.safetensors"}
    assert said["base"]["files"]["model.safetensors"] == facts
    assert said["identity"] == json.loads((trained / "run" / "data.json").read_text())
    assert said["identity"].keys() == {"data.train", "data.test", "data.template", "tokenizer", "base.model"}
    assert said["versions"].keys() == {"qlite", "torch", "bitsandbytes", "transformers", "safetensors", "tokenizers"}
    recipe = build_recipe(said["recipe"], "adapter")
    assert (recipe.base.bits, recipe.base.quant_type, recipe.method.rank, recipe.data.train) == (4, "nf4", 4, "train.jsonl")
    assert str(trained.parent) not in text


def test_peft_loads_it_and_export_keeps_what_it_says(trained, tmp_path):
    export(["--adapter", str(trained / "run"), "--out", str(tmp_path / "out")])
    assert read_provenance(tmp_path / "out") == read_provenance(trained / "run" / "adapter")
    base = AutoModelForCausalLM.from_pretrained(trained / "base", dtype=torch.float32)
    assert PeftModel.from_pretrained(base, tmp_path / "out").peft_config["default"].r == 4


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("alpha = 32.0", "alpha = 64.0", "method.alpha: 32.0 -> 64.0"),
        ("rslora = false", "rslora = true", "method.rslora: false -> true"),
        ("\nbits = 4", "\nbits = 8", "base.bits: 4 -> 8"),
    ],
)
def test_keys_that_no_tensor_shows_are_compared(mine, old, new, told):
    path = mine / "run" / "recipe.toml"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(AdapterError, match=rf"was trained with other keys than .*recipe.toml has now: {told}\. Put the old ones back"):
        opened(mine)


def test_keys_that_change_nothing_of_it_are_not(mine):
    path = mine / "run" / "recipe.toml"
    path.write_text(path.read_text().replace("cache = true", "cache = false").replace("dropout = 0.1", "dropout = 0.0"))
    opened(mine).attach()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> Path:
    """A finished run by two methods."""
    folder = tmp_path_factory.mktemp("of_two")
    method = {"name": ["lora", "ia3"], "lora": {"rank": 4, "dropout": 0.1}, "ia3": {}}
    run(tiny_recipe(folder, method=method, train={"steps": 2, "exact_match_rows": 0, "eval_every": 0}))
    return folder


def test_of_several_methods_each_key_is_compared_by_itself(of_two):
    path = of_two / "run" / "recipe.toml"
    text = path.read_text()
    try:
        path.write_text(text.replace("dropout = 0.1", "dropout = 0.0"))
        opened(of_two).attach()
        path.write_text(text.replace("alpha = 32.0", "alpha = 64.0"))
        with pytest.raises(AdapterError, match=r"recipe.toml has now: method\.lora\.alpha: 32.0 -> 64.0\. Put the old ones back"):
            opened(of_two)
    finally:
        path.write_text(text)


def test_a_run_of_several_methods_is_opened_after_a_method_has_got_a_new_key(of_two, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(of_two, folder)
    path = folder / "run" / "recipe.toml"
    path.write_text(path.read_text().replace(str(of_two), str(folder)))
    weights = folder / "run" / "adapter" / WEIGHTS
    said = read_provenance(weights.parent)
    del said["recipe"]["method"]["lora"]["loftq_rounds"]  # as an earlier version would have written it
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(weights), weights, metadata | {KEY: json.dumps(said)})
    opened(folder).attach()


def test_another_base_under_the_same_path_is_refused(mine):
    change_base(mine)
    with pytest.raises(AdapterError, match=r"was trained over another base: base \(model.safetensors, .*and this is base \(model.saf"):
        opened(mine)
    with pytest.raises(AdapterError):
        export(["--merge", str(mine / "run"), "--device", "cpu", "--out", str(mine / "out")])
    assert not (mine / "out").exists()


def test_the_same_base_elsewhere_is_the_same(mine):
    """Its files may have other names, as GGUF files often do."""
    shutil.move(mine / "base", mine / "moved")
    (mine / "moved" / "model.safetensors").rename(mine / "moved" / "weights.safetensors")
    path = mine / "run" / "recipe.toml"
    path.write_text(path.read_text().replace(str(mine / "base"), str(mine / "moved")))
    opened(mine).attach()


def test_another_tokenizer_is_told(mine):
    path = mine / "base" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tokenizer))
    notes: list[str] = []
    opened(mine, notes)
    assert len(notes) == 1
    assert "the tokenizer is not the one of training" in notes[0]


def test_another_config_is_told(mine):
    path = mine / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 500.0}))
    notes: list[str] = []
    opened(mine, notes)
    assert notes == ["the base's config.json is not the one of training"]


def test_an_adapter_that_says_nothing_or_nonsense_is_opened(mine):
    path = mine / "run" / "adapter" / WEIGHTS
    tensors = load_file(path)
    for metadata in ({}, {KEY: "{"}, {KEY: "[]"}, {KEY: '{"base": 3, "recipe": 4}'}, {KEY: '{"base": {"files": {"a": 1}}, "recipe": "["}'}):
        save_file(tensors, path, metadata={"format": "pt", **metadata})
        notes: list[str] = []
        base = opened(mine, notes).base
        assert (notes, other_base(path.parent, base)) == ([], None)


def test_a_merge_into_another_base_is_explained(mine, capfd):
    shutil.copytree(mine / "base", mine / "other" / "base")
    change_base(mine / "other")
    merge([str(mine / "run" / "adapter"), "--base", str(mine / "other" / "base"), "--out", str(mine / "merged")])
    told = " ".join("".join(capfd.readouterr()).split())
    assert "the adapter was trained over another base: base (model.safetensors" in told
    assert (mine / "merged" / "model.safetensors").is_file()
