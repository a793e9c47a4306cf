"""LoRA, rsLoRA and DoRA beside PEFT's over some steps, and LoftQ's beginning: the same losses, gradients and weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import loftq_utils
from torch import nn

from qlite.methods.base import trainable_tensors
from qlite.methods.lora import LoRA
from qlite.optim.build import Optimizer
from tests.tiny import tiny_llama

BATCHES = torch.randint(0, 64, (6, 2, 9), generator=torch.Generator().manual_seed(1))
KINDS = {
    "lora": ({}, {}),
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "ranks by name": (
        {"rank_per_target": {"q_proj": 2}, "alpha_per_target": {"q_proj": 3.0}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
}


def own_tensors(peft_model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what PEFT trains, by our names."""
    inner = peft_model.base_model.model.named_parameters()
    return {name.replace(".default", "").replace("vector.weight", "vector"): p for name, p in inner if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_gradients_and_weights_over_some_steps_are_pefts(kind):
    keys, options = KINDS[kind]
    model, method = tiny_llama(), LoRA(rank=4, alpha=8.0, **keys)
    method.attach(model.train())
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options))
    ours, other = trainable_tensors(model), own_tensors(theirs.train())
    assert ours.keys() == other.keys()
    generator = torch.Generator().manual_seed(2)
    for name, p in ours.items():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)  # B begins as 0, and A would have no gradient
        other[name].data.copy_(p.data)
    optimizers = [
        Optimizer(name="torch_adamw", lr=1e-2).build(method.param_groups(model, 1e-2), torch.device("cpu")),
        torch.optim.AdamW(other.values(), lr=1e-2, weight_decay=0),
    ]
    for ids in BATCHES:
        losses = [each(input_ids=ids, labels=ids).loss for each in (model, theirs)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        for loss in losses:
            loss.backward()
        found = optimizers[0].gradients()
        for name, p in ours.items():
            torch.testing.assert_close(found[p], other[name].grad, rtol=2e-3, atol=5e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, p in ours.items():
        torch.testing.assert_close(p.data, other[name].data, rtol=0, atol=2e-4)


def test_loftq_begins_as_pefts_with_the_best_update_of_what_quantising_takes_away():
    """PEFT 0.21, utils/loftq_utils.py, _low_rank_decomposition, as _loftq_init_new calls it: exact SVD, and no scale."""
    name, generator = "model.layers.0.mlp.up_proj", torch.Generator().manual_seed(0)
    weight = torch.randn(128, 64, generator=generator)
    weight[:, 9] *= 30  # blocks with a large number in them lose most: a few directions stand out
    model, method = tiny_llama("4 bit"), LoRA(rank=4, alpha=6.0, init="loftq", targets=("*.0.mlp.up_proj",))
    model.get_submodule(name).store(weight)
    method.attach(model)
    method.start(model, lambda _: weight)
    ours = model.get_submodule(name)
    lost = weight - ours.base.dense(torch.float32)
    # Its own quantising wants a card; its decomposition does not.
    found = loftq_utils._low_rank_decomposition(lost, reduced_rank=4)
    left = [(lost - update).norm() for update in (ours.scaling * ours.lora_B.weight @ ours.lora_A.weight, found["L"] @ found["R"])]
    assert left[1] < 0.95 * lost.norm()
    assert left[0] <= 1.006 * left[1]
