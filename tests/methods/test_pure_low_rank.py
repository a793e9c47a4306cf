"""Pure low-rank layers: a product of two plain layers, its nearest start, and the starts that would train nothing."""

import copy
import re

import pytest
import torch
from torch import nn

from qlite import export
from qlite.errors import ExportError, RecipeError
from qlite.methods import Combined
from qlite.methods.base import adapted_linears, adapters_off, trainable_tensors
from qlite.methods.lora import LoRA
from qlite.methods.low_rank import LowRank, resize
from qlite.methods.pure_low_rank import PureLowRank, PureLowRankLinear
from qlite.optim.build import Optimizer
from qlite.quant.linear import dense_weight
from qlite.training.step import Stepper
from tests.tiny import STORAGES, one_batch, tiny_llama
from tests.tiny_run import run, tiny_recipe

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


def attached(method: PureLowRank, storage: str = "16 bit", seed: int = 5) -> nn.Module:
    """Return a tiny model with ``method`` at its start; what it starts from are the weights before they were quantised."""
    model, originals = tiny_llama(storage), dict(tiny_llama().named_modules())
    torch.manual_seed(seed)
    method.attach(model)
    method.start(model, lambda name: dense_weight(originals[name]))
    return model


def trained(model: nn.Module, method: PureLowRank, steps: int, skipped: int = 0) -> list[float]:
    """Train ``steps`` steps as a run does, but for the one of number ``skipped``; return their losses."""
    optimizer = Optimizer(name="torch_adamw", lr=1e-2).build(method.param_groups(model, 1e-2), CPU)
    stepper, losses = Stepper(model, method, 4, CPU), []
    for step in {*range(1, steps + 1)} - {skipped}:
        stepper.before_update = lambda step=step: method.before_step(model, optimizer, step, steps)
        losses.append(stepper.step([one_batch()], optimizer, clip_norm=1.0).loss)
    return losses


@pytest.mark.parametrize("storage", STORAGES)
def test_it_computes_and_learns_what_two_plain_layers_in_a_row_do(storage):
    """The reference: nn.Sequential(Linear(in, r, no bias), Linear(r, out, the frozen bias)) with torch's own Adam."""
    torch.manual_seed(0)
    frozen = nn.Linear(32, 64)
    base = STORAGES[storage].make(32, 64, True, torch.float32, "cpu") if storage != "16 bit" else copy.deepcopy(frozen)
    if storage != "16 bit":
        base.store(frozen.weight.detach())
        base.bias = frozen.bias.detach()
    ours = PureLowRankLinear(base.requires_grad_(False), 5, "autoencoder")
    plain = nn.Sequential(nn.Linear(32, 5, bias=False), nn.Linear(5, 64))
    plain[0].weight.data.copy_(ours.factor_A)
    plain[1].weight.data.copy_(ours.factor_B)
    plain[1].bias = nn.Parameter(frozen.bias.detach(), requires_grad=False)
    x, y = torch.randn(16, 32), torch.randn(16, 64)
    sides = [(ours, [ours.factor_A, ours.factor_B]), (plain, [plain[0].weight, plain[1].weight])]
    optimizers = [torch.optim.Adam(tensors, lr=1e-2) for _, tensors in sides]
    for _ in range(4):
        for (module, _), optimizer in zip(sides, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(module(x), y).backward()
        for one, other in zip(sides[0][1], sides[1][1], strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        torch.testing.assert_close(ours(x), plain(x))
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(sides[0][1], sides[1][1], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("storage", STORAGES)
def test_svd_starts_as_the_nearest_product_of_its_rank_to_the_unquantised_weight(storage):
    model, plain = attached(PureLowRank(rank=6), storage), dict(tiny_llama().named_modules())
    for name, linear in adapted_linears(model):
        weight = dense_weight(plain[name])
        nearest = resize(LowRank(torch.eye(weight.shape[1]), weight, 1.0), 6).update.dense()
        torch.testing.assert_close(linear.merged_weight(torch.zeros_like(weight)), nearest, atol=1e-5, rtol=1e-4)


def test_at_full_rank_svd_starts_as_the_base():
    model = attached(PureLowRank(rank=64, targets=("q_proj", "o_proj", "gate_proj", "down_proj")))
    torch.testing.assert_close(model(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)


def test_of_the_bases_weight_nothing_is_left_and_off_all_of_it_is_back():
    model = attached(PureLowRank(rank=8, init="autoencoder"))
    before = model(input_ids=IDS).logits
    for _, linear in adapted_linears(model):
        linear.base.weight.data.mul_(3)
    assert torch.equal(model(input_ids=IDS).logits, before)
    for _, linear in adapted_linears(model):
        linear.base.weight.data.div_(3)
    with adapters_off(model):
        torch.testing.assert_close(model(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits)


def test_the_same_seed_gives_the_same_values_and_another_gives_others():
    one, same, other = (trainable_tensors(attached(PureLowRank(rank=4, init="autoencoder"), seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_from_loras_start_b_is_zero_and_what_can_move_moves():
    method = PureLowRank(rank=8, init="lora", targets=("v_proj", "gate_proj"))
    model = attached(method)
    assert all(not linear.factor_B.any() and linear.factor_A.any() for _, linear in adapted_linears(model))
    losses = trained(model, method, 8)
    assert losses[-1] < losses[0]
    assert all(linear.factor_B.any() for _, linear in adapted_linears(model))


@pytest.mark.parametrize("targets", [("v_proj", "o_proj"), ("q_proj", "k_proj"), ("gate_proj", "up_proj"), ("down_proj", "up_proj")])
@pytest.mark.parametrize("steps", [1, 5])
def test_zeros_that_wait_for_each_other_are_refused_and_not_trained_in_vain(targets, steps):
    method = PureLowRank(rank=8, init="lora", targets=targets)
    with pytest.raises(RecipeError, match=re.escape('method.init = "lora": B is zero and gets no gradient in model.layers.0.')):
        trained(attached(method), method, steps)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_one_that_only_waits_for_anothers_first_step_is_not_refused(steps):
    method = PureLowRank(rank=8, init="lora", targets=("q_proj", "o_proj"))
    assert len(trained(attached(method), method, steps)) == steps


def test_where_the_step_that_would_be_looked_at_is_skipped_the_next_one_is():
    method = PureLowRank(rank=8, init="lora", targets=("q_proj", "k_proj", "up_proj"))
    with pytest.raises(RecipeError, match=r"gets no gradient in model.layers.0.self_attn.q_proj"):
        trained(attached(method), method, 5, skipped=3)


@pytest.mark.parametrize("init", ["svd", "autoencoder"])
def test_the_other_starts_train_every_linear(init):
    method = PureLowRank(rank=8, init=init)
    losses = trained(attached(method), method, 8)
    assert losses[-1] < losses[0]


def test_a_rank_that_a_linear_cannot_have_is_refused():
    with pytest.raises(RecipeError, match=r"method.rank = 33: is more than model.layers.0.self_attn.k_proj can have \(32\)"):
        PureLowRank(rank=33).attach(tiny_llama())


@pytest.mark.parametrize("first", ["lora", "low_rank"])
def test_two_methods_that_need_a_linears_own_weight_do_not_share_one(first):
    parts = {"lora": LoRA(rank=2), "low_rank": PureLowRank(rank=2)}
    both = Combined(parts=(parts.pop(first), *parts.values()))
    with pytest.raises(RecipeError, match="adapted by another of the methods already"):
        both.attach(tiny_llama())


def test_beside_lora_on_other_linears_both_are_trained():
    both = Combined(parts=(LoRA(rank=2, targets=("v_proj",)), PureLowRank(rank=8, targets=("q_proj",))))
    model = tiny_llama()
    both.attach(model)
    both.start(model, lambda name: dense_weight(dict(tiny_llama().named_modules())[name]))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in trainable_tensors(model)} == {"lora_A", "lora_B", "q_proj"}


# A whole run


@pytest.mark.slow
def test_a_run_stopped_goes_on_to_the_same_bytes_and_is_merged(tmp_path):
    keys = {"method": {"name": "low_rank", "rank": 16}, "train": {"steps": 4, "accumulation": 1, "exact_match_rows": 0}}
    recipe = tiny_recipe(tmp_path, **keys)
    stopped = tiny_recipe(tmp_path, **keys, output={"dir": str(tmp_path / "stopped")})
    seen = run(recipe)
    run(stopped, stop_after=2)
    run(stopped)
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert any("low_rank: " in note and "trained parameters" in note for note in seen.notes)
    merged = export(tmp_path / "run", merge="fp32", out=tmp_path / "merged", device="cpu", quiet=True)
    for kind in ("dequantised", "original"):
        assert merged.audit.found[kind].top1 > 0.9, kind
    with pytest.raises(ExportError, match="PEFT has no adapter of this kind"):
        export(tmp_path / "run", adapter="peft", out=tmp_path / "peft", quiet=True)
    with pytest.raises(ExportError, match="llama.cpp's adapters are LoRA's, and this run has trained by low_rank"):
        export(tmp_path / "run", adapter="gguf", out=tmp_path / "gguf", quiet=True)


@pytest.mark.slow
def test_what_saves_memory_changes_nothing_of_it(tmp_path):
    keys = {"method": {"name": "low_rank", "rank": 16}, "train": {"steps": 3, "accumulation": 1, "exact_match_rows": 0}}
    moved = {"base": "host", "embedding": "host", "saved_inputs": "host"}  # these only move
    memories = {"plain": {}, "moved": moved, "tiled": {"mlp_chunk": 16}}
    losses = {}
    for name, memory in memories.items():
        recipe = tiny_recipe(tmp_path, **keys, memory={"checkpointing": "block", **memory}, output={"dir": str(tmp_path / name)})
        losses[name] = [report.loss for report in run(recipe).steps]
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("plain", "moved")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert losses["tiled"] == pytest.approx(losses["plain"], rel=0.01)
    assert losses["plain"][-1] < losses["plain"][0]
