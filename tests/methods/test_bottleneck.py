"""Bottleneck adapters beside the paper's block written out, and what they refuse."""

import pytest
import torch

from qlite.errors import NotMergeable, RecipeError
from qlite.formats.merged import merged_tensors
from qlite.methods.base import trainable_count, trainable_tensors
from qlite.methods.bottleneck import Bottleneck
from qlite.model.head import hidden_states
from tests.methods.test_contract import IDS
from tests.reference.bottleneck import states_of
from tests.tiny import tiny_llama


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_forward_and_gradients_are_those_of_the_papers_block(placement):
    model = tiny_llama()
    Bottleneck(width=8, placement=placement).attach(model)
    generator, tensors = torch.Generator().manual_seed(3), trainable_tensors(model)
    for tensor in tensors.values():
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    given = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    found, wanted = hidden_states(model, IDS), states_of(tiny_llama(), IDS, given, placement == "houlsby")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    weights = torch.randn(found.shape, generator=generator)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert len(given) == (16 if placement == "houlsby" else 8)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.grad, given[name].grad, atol=1e-4, rtol=1e-3)


def test_houlsby_trains_two_adapters_a_block_and_pfeiffer_one():
    counts = []
    for placement in ("houlsby", "pfeiffer"):
        model = tiny_llama()
        Bottleneck(width=8, placement=placement).attach(model)
        counts.append(trainable_count(model))
    one = 2 * 8 * 64 + 8 + 64  # D, U and their biases, section 2.1: 2md + d + m
    assert counts == [4 * one, 2 * one]


def test_the_same_seed_draws_the_same_adapter_in_any_dtype():
    drawn = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama(dtype=dtype)
        torch.manual_seed(5)
        Bottleneck(width=8).attach(model)
        drawn.append(model.model.layers[1].mlp.down_proj.adapter_down.weight.detach())
    assert torch.equal(drawn[0].bfloat16(), drawn[1])


def test_merging_is_refused_before_anything_is_computed():
    model = tiny_llama()
    Bottleneck(width=8).attach(model)
    with pytest.raises(NotMergeable, match="a network of its own and no change of a weight"):
        next(iter(merged_tensors(model)))


def test_all_that_names_no_layer_is_told_at_once():
    with pytest.raises(RecipeError) as caught:
        Bottleneck(attention_output=("out_proj",), mlp_output=("fc2",)).attach(tiny_llama())
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        'method.mlp_output: no linear layer is called "fc2"',
        'method.attention_output: no linear layer is called "out_proj"',
    ]
    with pytest.raises(RecipeError, match=r"method.mlp_output = \[\]: names no layer"):
        Bottleneck(mlp_output=()).attach(tiny_llama())
    with pytest.raises(RecipeError, match="is one of method.mlp_output, too"):
        Bottleneck(attention_output=("*_proj",)).attach(tiny_llama())
