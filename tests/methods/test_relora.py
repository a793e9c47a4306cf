"""ReLoRA beside its paper's own way, which merges into a dense float32 weight; restarts, rates, refusals, and what PEFT gets."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from qlite.errors import Diverged, RecipeError
from qlite.formats.peft import CONFIG, PEFT, write_adapter
from qlite.methods.base import adapted_linears
from qlite.methods.relora import ReLoRA
from qlite.optim.build import Optimizer
from qlite.quant.linear import dense_weight
from qlite.training.step import Stepper
from tests.marks import slow
from tests.reference.relora import EPS, losses_and_weights
from tests.tiny import tiny_llama
from tests.tiny_run import run, tiny_recipe

STEPS, CPU, LR = 12, torch.device("cpu"), 1e-2
BATCHES = torch.randint(0, 64, (STEPS, 2, 9), generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, method: ReLoRA) -> list[float]:
    optimizer = Optimizer(name="torch_adamw", lr=LR, eps=EPS).build(method.param_groups(model, LR), CPU)
    losses = []
    for step, ids in enumerate(BATCHES, start=1):
        torch.manual_seed(100 + step)  # as a run does for every step
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.set_lr_factor(method.lr_factor(step, STEPS))
        method.before_step(model, optimizer, step, STEPS)
        optimizer.step()
        method.after_step(model, optimizer, step, STEPS)
    return losses


def attached(method: ReLoRA, storage: str = "16 bit", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_llama(storage, dtype)
    torch.manual_seed(4)
    method.attach(model)
    return model.train()


@pytest.mark.parametrize("pruned", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("storage", ["16 bit", "4 bit"])
def test_it_trains_as_if_each_update_were_merged_into_a_float32_weight(storage, pruned):
    """Over 4 bit the dense weight is what the packed one stands for: re-quantised it would lose the updates, as the next test shows."""
    method = ReLoRA(rank=4, resets=2, warmup=2, pruned=pruned)
    model, dense = attached(method, storage), tiny_llama()
    layers = dict(adapted_linears(model))
    for name, layer in layers.items():
        dense.get_submodule(name).weight.data.copy_(dense_weight(layer.base))
    start = {name: (layer.lora_A.weight.detach().clone(), layer.lora_B.weight.detach().clone()) for name, layer in layers.items()}
    rates = [LR * factor for factor in (1, 1, 1, 1, 0.5, 1, 1, 1, 0.5, 1, 1, 1)]
    want, weights = losses_and_weights(dense, start, BATCHES, 8.0, rates, {4: 104, 8: 108}, pruned)
    assert trained(model, method) == pytest.approx(want, abs=1e-4)
    for name, layer in layers.items():
        merged = layer.merged_weight(dense_weight(layer.base))
        assert (merged - weights[f"{name}.weight"]).norm() < 1e-3 * (merged - dense_weight(layer.base)).norm()


def test_requantised_the_first_updates_would_be_nearly_gone():
    method = ReLoRA(rank=4, resets=2, warmup=0)
    model = attached(method, "4 bit")
    for name, layer in adapted_linears(model):
        layer.lora_B.weight.data.normal_(std=1e-4, generator=torch.Generator().manual_seed(len(name)))
        before = dense_weight(layer.base)
        update = layer.merged_weight(before) - before
        layer.base.store(before + update)
        kept = ((dense_weight(layer.base) - before) * update).sum() / update.square().sum()
        assert kept < 0.6


def test_a_restart_changes_nothing_of_what_the_model_computes():
    method = ReLoRA(rank=4, resets=1, warmup=1)
    model = attached(method, "4 bit", torch.bfloat16)
    optimizer = Optimizer(name="adamw8bit", lr=LR).build(method.param_groups(model, LR), CPU)
    for ids in BATCHES[:3]:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    before = layer.merged_weight(dense_weight(layer.base))
    method.after_step(model, optimizer, 6, STEPS)
    torch.testing.assert_close(layer.merged_weight(dense_weight(layer.base)), before, atol=1e-6, rtol=0)
    assert not layer.lora_B.weight.any()
    assert layer.past_B.any()


def test_a_new_A_is_drawn_from_the_steps_own_seed_and_differs_by_layer_and_restart():
    drawn = {}
    for step in (4, 8, 4):
        model = attached(method := ReLoRA(rank=4, resets=2, warmup=1))
        optimizer = Optimizer(name="torch_adamw", lr=LR).build(method.param_groups(model, LR), CPU)
        torch.manual_seed(step)
        torch.rand(step)  # what a step has drawn makes no difference
        method.after_step(model, optimizer, step, STEPS)
        found = [module.lora_A.weight.detach().clone() for _, module in adapted_linears(model)]
        assert all(torch.equal(a, b) for a, b in zip(found, drawn.get(step, found), strict=True))
        drawn[step] = found
    assert not torch.equal(drawn[4][0], drawn[8][0])
    assert not torch.equal(drawn[4][0], drawn[4][3])


def test_the_rate_rises_anew_after_each_restart():
    method = ReLoRA(rank=4, resets=2, warmup=3)
    assert [method.lr_factor(step, STEPS) for step in range(1, 13)] == pytest.approx([1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1 / 3, 2 / 3, 1, 1])
    assert all(ReLoRA(resets=2, warmup=0).lr_factor(step, STEPS) == 1 for step in range(1, 13))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"resets": 3, "warmup": 5}, r"method.resets = 3, method.warmup = 5: 6 steps are cut into parts of 1, which end within"),
        ({"resets": 9, "warmup": 0}, r"method.resets = 9, method.warmup = 0: 6 steps are cut into parts of 0"),
    ],
)
def test_parts_that_are_too_short_are_refused_before_anything_is_loaded(keys, told, tmp_path):
    with pytest.raises(RecipeError, match=told):
        run(tiny_recipe(tmp_path, method={"name": "relora", **keys}))


def test_a_rank_that_a_linear_cannot_have_is_refused():
    with pytest.raises(RecipeError, match=r"method.rank = 100: is more than model.layers.0.self_attn.q_proj can have \(64\)"):
        ReLoRA(rank=100).attach(tiny_llama())


def test_peft_reads_it_as_one_lora_of_all_ranks(tmp_path):
    model = attached(method := ReLoRA(rank=4, resets=2, warmup=1))
    trained(model, method)
    write_adapter(tmp_path, model, method, "base")
    assert not (tmp_path / CONFIG).exists()
    assert json.loads((tmp_path / PEFT / CONFIG).read_text())["r"] == 12
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / PEFT).eval()
    torch.testing.assert_close(theirs(input_ids=BATCHES[0]).logits, model.eval()(input_ids=BATCHES[0]).logits, atol=1e-5, rtol=1e-5)


def test_a_restart_that_is_due_after_a_skipped_step_is_made_all_the_same(tmp_path, monkeypatch):
    make, made = Stepper.step, []

    def step(stepper: Stepper, *arguments: object) -> object:
        made.append(make(stepper, *arguments))
        if len(made) == 2:
            raise Diverged("planted")
        return made[-1]

    monkeypatch.setattr(Stepper, "step", step)
    keys = {"name": "relora", "rank": 2, "resets": 1, "warmup": 1}
    run(tiny_recipe(tmp_path, method=keys, train={"steps": 4, "exact_match_rows": 0, "eval_every": 0, "max_skipped": 1}))
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if name.endswith("past_B"))


@pytest.mark.parametrize(
    "changes", [{"memory": {"base": "host", "embedding": "host"}}, *map(slow, ({"memory": {"base": "host"}}, {}))], ids=str
)
def test_stopped_after_a_restart_or_streamed_it_ends_with_the_same_bytes(changes, tmp_path):
    files = []
    for name, stop, extra in (("straight", None, {}), ("other", 4, changes)):
        keys = {"name": "relora", "rank": 2, "resets": 2, "warmup": 1, "dropout": 0.1}
        recipe = tiny_recipe(
            tmp_path, method=keys, train={"exact_match_rows": 0, "eval_every": 0}, output={"dir": str(tmp_path / name)}, **extra
        )
        if stop:
            run(recipe, stop)
        run(recipe)
        files.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert all(files[0][name].any() for name in files[0])
