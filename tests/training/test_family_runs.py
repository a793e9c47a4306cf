"""LoRA's relatives as whole runs: stopped and gone on, opened, and out in every form, over the base as stored and as its files have it."""

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlite.errors import QliteError
from qlite.export import export
from qlite.methods.base import adapted_linears
from qlite.model.load import LoadedBase
from qlite.model.originals import original_weights
from qlite.quant.linear import dense_weight
from qlite.training.merging import Merge
from tests.marks import slow
from tests.tiny_run import opened_run, run, tiny_recipe

IDS = torch.tensor([[5, 9, 12, 7, 8, 30, 4]])
METHODS = {
    "pissa": {"init": "pissa", "rank": 4},
    "loftq": {"init": "loftq", "rank": 4, "dropout": 0.0},
    "loftq in rounds": {"init": "loftq", "loftq_rounds": 2, "rank": 4},
    "adalora": {"name": "adalora", "rank": 2, "start_rank": 4, "interval": 1},
    "relora": {"name": "relora", "rank": 4, "resets": 1, "warmup": 1},
}


def recipe_of(folder: Path, name: str, out: str = "run"):
    train = {"steps": 4, "exact_match_rows": 0, "eval_every": 0}
    tables = {"method": METHODS[name], "train": train, "output": {"dir": str(folder / out), "save_every": 2}}
    return tiny_recipe(folder, **tables)


@pytest.mark.parametrize("name", ["pissa", *map(slow, ("loftq", "loftq in rounds", "adalora", "relora"))])
def test_a_run_goes_on_with_the_same_bytes_and_out_as_what_it_learned(name, tmp_path):
    straight = recipe_of(tmp_path, name, "straight")
    run(straight)
    recipe = recipe_of(tmp_path, name)
    run(recipe, stop_after=3)
    run(recipe)
    adapters = [(tmp_path / out / "adapter" / "adapter_model.safetensors").read_bytes() for out in ("straight", "run")]
    assert adapters[0] == adapters[1]

    opened = opened_run(tmp_path)
    original = original_weights_of(opened.base)
    over = {"original": {}, "dequantised": {}}
    for layer_name, layer in adapted_linears(opened.base.model):
        over["original"][layer_name] = layer.merged(layer.unquantised(original(layer_name)))
        over["dequantised"][layer_name] = layer.merged(dense_weight(layer.frozen))
    for onto, weights in over.items():
        export(tmp_path / "run", merge=Merge(torch.float32, onto, rows=2), out=tmp_path / onto, quiet=True)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / onto)
        for layer_name, weight in weights.items():
            torch.testing.assert_close(merged.get_submodule(layer_name).weight, weight, atol=1e-6, rtol=1e-6)
        if onto == "original":
            want = merged(input_ids=IDS).logits
    export(tmp_path / "run", adapter="peft", out=tmp_path / "peft", quiet=True)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits, want, atol=1e-5, rtol=1e-4)


def original_weights_of(base: LoadedBase):
    """Return what the files have, for a base whose adapter is on already: a plain one of the same files is asked."""
    plain = AutoModelForCausalLM.from_pretrained(base.checkpoint.weight_files()[0].parent)
    return lambda name: plain.get_submodule(name).weight.detach().float()


def test_the_base_cache_never_holds_what_a_method_has_left_of_the_weights(tmp_path):
    recipe = recipe_of(tmp_path, "pissa")
    run(recipe)
    loaded = [replace(recipe.base, cache=cache).load(torch.device("cpu"), lambda *_: None) for cache in (True, False)]
    name = "model.layers.0.mlp.up_proj"
    kept, fresh = (dense_weight(base.model.get_submodule(name)) for base in loaded)
    assert torch.equal(kept, fresh)
    assert (original_weights(loaded[0])(name) - kept).norm() < 0.2 * kept.norm()


@pytest.mark.parametrize("name", ["pissa", *map(slow, ("relora", "adalora"))])
def test_llama_cpp_gets_the_update_or_a_reason(name, tmp_path):
    run(recipe_of(tmp_path, name))
    if name == "adalora":
        with pytest.raises(QliteError, match=r"SVDLinear; use --gguf f16"):
            export(tmp_path / "run", adapter="gguf", out=tmp_path / "gguf", quiet=True)
        return
    export(tmp_path / "run", adapter="gguf", out=tmp_path / "gguf", quiet=True)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    reader = gguf.GGUFReader(file)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    layer = opened_run(tmp_path).base.model.get_submodule("model.layers.1.mlp.down_proj")
    A, B = (tensors[f"blk.1.ffn_down.weight.lora_{which}"] for which in "ab")
    torch.testing.assert_close(alpha / B.shape[1] * (B @ A), layer.update().dense(), atol=1e-6, rtol=1e-5)
    assert B.shape[1] == 8
