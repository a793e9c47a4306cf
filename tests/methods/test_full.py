"""Full fine-tuning: the gradient of every weight is torch's own, tied tensors stay one, and what cannot be trained is refused by key."""

import pytest
import torch
from torch import nn

from qlite.errors import ModelError, RecipeError
from qlite.methods.base import trainable_tensors
from qlite.methods.full import Full, block_of
from qlite.model.fusing import fuse
from qlite.model.host_embedding import keep_embedding_on_host
from qlite.model.streaming import stream_blocks
from qlite.optim.build import Optimizer
from qlite.recipe.read import build_recipe
from qlite.training.step import Stepper
from tests.tiny import one_batch, tiny_llama

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_three_steps_are_those_of_torchs_adamw_on_the_plain_model(tied):
    """The norms are fused, and the head's gradient is the loss's own."""
    model, plain, batch = tiny_llama(tie_word_embeddings=tied), tiny_llama(tie_word_embeddings=tied).requires_grad_(True), one_batch()
    fuse(model)
    Full().attach(model)
    optimizer = Optimizer(name="torch_adamw", lr=1e-2).build(Full().param_groups(model, 1e-2), CPU)
    stepper, reference = Stepper(model, Full(), 4, CPU), torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    labels = torch.full((batch.input_ids.numel(),), -100)
    labels[torch.from_numpy(batch.predicts)] = torch.from_numpy(batch.targets)
    for _ in range(3):
        stepper.step([batch], optimizer, clip_norm=0)
        reference.zero_grad()
        nn.functional.cross_entropy(plain(input_ids=batch.input_ids).logits.flatten(0, 1), labels).backward()
        reference.step()
    own, start = dict(model.named_parameters()), dict(tiny_llama(tie_word_embeddings=tied).named_parameters())
    assert own.keys() == trainable_tensors(model).keys() == start.keys()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in own.items())
    for name, tensor in plain.named_parameters():
        # Where a gradient is nearly zero, Adam makes a step of its rounding; three whole steps are 0.03.
        torch.testing.assert_close(own[name], tensor, atol=3e-4, rtol=1e-3)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_the_optimizer_takes_the_weights_block_by_block():
    """A float32 master exists of one group at a time: of all weights at once it would be as large as their gradients."""
    model = tiny_llama()
    Full().attach(model)
    optimizer = Optimizer(name="torch_adamw").build(Full().param_groups(model, 1e-3), CPU)
    names = [
        {block_of(name) for name, p in trainable_tensors(model).items() if any(p is q for q in flat.params)} for flat in optimizer.flats
    ]
    assert names == [{""}, {"model.layers.0"}, {"model.layers.1"}]


def test_the_recipe_tells_every_key_that_cannot_be_at_once():
    tables = {
        "base": {"model": "x", "bits": 8, "embedding_bits": 4},
        "method": {"name": "full"},
        "data": {"train": "x.jsonl"},
        "train": {"steps": 1},
        "memory": {"base": "host", "embedding": "host"},
    }
    with pytest.raises(RecipeError) as caught:
        build_recipe(tables, "x.toml")
    assert caught.value.problems == [
        'base.bits = 8: method.name = "full" trains the weights themselves, and codes have no gradient; set it to 16',
        'base.embedding_bits = 4: method.name = "full" trains the weights themselves, and codes have no gradient; set it to 16',
        'memory.base = "host": method.name = "full" trains it, and what is trained lies on the device; set it to "device"',
        'memory.embedding = "host": method.name = "full" trains it, and what is trained lies on the device; set it to "device"',
    ]


@pytest.mark.parametrize("name", ["full", "galore"])
def test_beside_it_there_is_nothing_left_for_another_method(name):
    tables = {"base": {"model": "x", "bits": 16}, "method": {"name": ["lora", name]}, "data": {"train": "x"}, "train": {"steps": 1}}
    with pytest.raises(RecipeError, match=f'"{name}" trains every weight, so beside it there is nothing left for "lora"'):
        build_recipe(tables, "x.toml")


def test_a_trained_base_is_not_moved_to_the_host():
    """A plan that looks for ways out asks for it past the recipe's own check."""
    for move in (stream_blocks, keep_embedding_on_host):
        model = tiny_llama()
        Full().attach(model)
        with pytest.raises(ModelError, match="trained lies on the device; set"):
            move(model, CPU)
