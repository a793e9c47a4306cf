"""Runs that train whole layers beside LoRA: the same in every storage, resumed, switched off, merged and exported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlite.errors import ModelError, RecipeError
from qlite.formats.peft import CONFIG, PREFIX, WEIGHTS
from qlite.methods.base import adapters_off
from qlite.training.merging import Merge, write_audited
from qlite.training.open_run import open_run
from qlite.training.run_folder import RunFolder
from tests.marks import slow
from tests.tiny_run import Watcher, opened_run, run, save_tiny_base, tiny_recipe

WHOLE = {"modules_to_save": ["lm_head", "embed_tokens", "model.norm"]}
NAMES = {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
QUICK = {"train": {"exact_match_rows": 0, "eval_every": 0}}
CASES = {
    "dense vocabulary": {},
    "head in 4 bit, embedding in 8": {"base": {"head_bits": 4, "embedding_bits": 8}},
    "head in 8 bit, embedding in 4, packed lines": {"base": {"head_bits": 8, "embedding_bits": 4}, "train": {"packing": True}},
    "base on the host": {"memory": {"base": "host"}},
}


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(3, 15).unsqueeze(0)).logits.float()


def trained(folder: Path, method: dict, stop_after: int | None = None, **changes: dict) -> Path:
    """Run in ``folder``, stopped and gone on with if asked for; return the written adapter."""
    tables = {key: {**QUICK.get(key, {}), **changes.get(key, {})} for key in {*QUICK, *changes}}
    recipe = tiny_recipe(folder, method=method, **tables)
    if stop_after:
        run(recipe, stop_after)
    run(recipe)
    return folder / "run" / "adapter"


@pytest.mark.parametrize("case", ["head in 4 bit, embedding in 8", *map(slow, (c for c in CASES if c != "head in 4 bit, embedding in 8"))])
def test_a_run_that_trains_whole_layers_goes_on_to_the_same_bytes_switches_off_and_merges(case, tmp_path):
    for place in ("whole", "stopped"):
        (tmp_path / place).mkdir()
    adapter = trained(tmp_path / "whole", WHOLE, **CASES[case])
    again = trained(tmp_path / "stopped", WHOLE, 3, **CASES[case])
    assert (adapter / WEIGHTS).read_bytes() == (again / WEIGHTS).read_bytes()
    tensors = load_file(adapter / WEIGHTS)
    assert {name.removeprefix(PREFIX) for name in tensors if "lora" not in name} == NAMES
    assert {str(tensors[PREFIX + name].dtype) for name in NAMES} == {"torch.bfloat16"}
    assert set(json.loads((adapter / CONFIG).read_text())["modules_to_save"]) == {name.removesuffix(".weight") for name in NAMES}

    base = load_file(tmp_path / "whole" / "base" / "model.safetensors")
    assert all(not torch.equal(tensors[PREFIX + name].float(), base[name].bfloat16().float()) for name in NAMES)
    newest = max((tmp_path / "whole" / "run" / "checkpoints").iterdir())
    held = load_file(newest / "optimizer.safetensors")["0.remainder"].numel()
    assert held == sum(tensor.numel() for tensor in tensors.values())

    opened = opened_run(tmp_path / "whole")
    live = logits_of(opened.base.model)
    plain = open_run(RunFolder(tmp_path / "whole" / "run"), "cpu", lambda *_: None)
    with adapters_off(opened.base.model):
        assert torch.equal(logits_of(opened.base.model), logits_of(plain.base.model))
    assert not torch.equal(logits_of(opened.base.model), logits_of(plain.base.model))
    assert torch.equal(logits_of(opened.base.model), live)

    for onto in ("dequantised", "original"):
        write_audited(opened, tmp_path / onto, Merge(torch.float32, onto, most_kl=1.0), Watcher())
        written = load_file(tmp_path / onto / "model.safetensors")
        assert all(torch.equal(written[name], tensors[PREFIX + name].float()) for name in NAMES)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dequantised", dtype=torch.float32)
    # The run rounds every product to bfloat16.
    assert (logits_of(merged) - live).abs().max() < 0.05 * live.abs().max()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"modules_to_save": ["lm_hed"]}, 'method.modules_to_save: no layer is called "lm_hed"; did you mean "lm_head"?'),
        ({"modules_to_save": ["mlp"]}, 'method.modules_to_save: no layer is called "mlp"; this model has: '),
        ({"modules_to_save": ["q_proj"]}, '"model.layers.0.self_attn.q_proj" is one of method.targets, too'),
        ({"alpha_per_target": {"lm_head": 4}}, 'method.alpha_per_target: "lm_head" matches none of the 14 target layers; remove it'),
    ],
)
def test_what_cannot_be_trained_whole_is_said_before_a_weight_is_trained(method, message, tmp_path):
    with pytest.raises(RecipeError) as caught:
        run(tiny_recipe(tmp_path, method=method))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_all_problems_of_the_list_are_told_at_once(tmp_path):
    with pytest.raises(RecipeError) as caught:
        run(tiny_recipe(tmp_path, method={"modules_to_save": ["lm_hed", "nrm", "o_proj"]}))
    assert [
        word for word in ("lm_hed", "nrm", "layers.0.self_attn.o_proj", "layers.1.self_attn.o_proj") if word not in str(caught.value)
    ] == []


def test_a_trained_embedding_does_not_go_to_the_host(tmp_path):
    with pytest.raises(ModelError, match=r'memory.embedding = "host": the embedding is trained'):
        run(tiny_recipe(tmp_path, method={"modules_to_save": ["embed_tokens"]}, memory={"embedding": "host"}))
    assert not (tmp_path / "run").exists()


def test_the_base_of_these_runs_has_a_head_of_its_own(tmp_path):
    assert "lm_head.weight" in load_file(save_tiny_base(tmp_path) / "model.safetensors")
