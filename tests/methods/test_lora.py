"""LoRA's formulas against a restatement of the papers, and what targets and ranks choose."""

import math

import pytest
import torch
from torch import nn

from qlite.errors import RecipeError
from qlite.methods.base import adapted_linears, trainable_count
from qlite.methods.lora import DoRALinear, LoRA, LoRALinear
from tests.tiny import tiny_llama

LLAMA_LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def chosen(**fields) -> list[str]:
    model = tiny_llama()
    LoRA(rank=2, **fields).attach(model)
    return [name for name, _ in adapted_linears(model)]


def layer_with_moved_B(cls: type[LoRALinear], **changes) -> LoRALinear:
    torch.manual_seed(0)
    base = nn.Linear(24, 16).requires_grad_(False)
    layer = cls(base, **{"rank": 4, "scaling": 2.0, "dropout": 0.0, **changes})
    nn.init.normal_(layer.lora_B.weight)
    return layer


def test_lora_is_W_x_plus_alpha_over_r_times_B_A_x():
    layer, x = layer_with_moved_B(LoRALinear), torch.randn(5, 24)
    A, B, W, b = layer.lora_A.weight, layer.lora_B.weight, layer.base.weight, layer.base.bias
    torch.testing.assert_close(layer(x), x @ W.T + b + 2.0 * (x @ A.T) @ B.T)


def test_dora_is_the_papers_equation_5():
    layer, x = layer_with_moved_B(DoRALinear), torch.randn(5, 24)
    nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 1.5)
    V = layer.base.weight + 2.0 * layer.lora_B.weight @ layer.lora_A.weight
    W = layer.lora_magnitude_vector[:, None] * V / V.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x), x @ W.T + layer.base.bias, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.row_norm(), V.norm(dim=1))
    torch.testing.assert_close(layer.merged_weight(layer.base.weight), W)


def test_dora_does_not_derive_through_the_norm():
    # Section 4.3: the norm counts as a constant. With respect to m the gradient is then V x / ||V||, exactly.
    layer, x = layer_with_moved_B(DoRALinear), torch.randn(1, 24)
    (layer(x).sum() - layer.base.bias.sum()).backward()
    V = layer.base.weight + 2.0 * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(layer.lora_magnitude_vector.grad, (x @ V.T)[0] / V.norm(dim=1), atol=1e-5, rtol=1e-4)
    m = (layer.lora_magnitude_vector / V.norm(dim=1)).detach()
    torch.testing.assert_close(layer.lora_B.weight.grad, 2.0 * m[:, None] * (x @ layer.lora_A.weight.T), atol=1e-5, rtol=1e-4)


def test_dropout_touches_the_adapter_alone():
    for cls in (LoRALinear, DoRALinear):
        layer, x = layer_with_moved_B(cls, dropout=0.5).train(), torch.ones(400, 24)
        torch.manual_seed(0)
        y = layer(x)
        mean, alone = y.mean(0), layer.eval()(x)[0]
        torch.testing.assert_close(mean, alone, atol=0.6, rtol=0.2)
        assert y.std(0).min() > 0.05
        nn.init.zeros_(layer.lora_B.weight)
        torch.testing.assert_close(layer.train()(x), layer.base(x))


def test_rslora_scales_by_the_root_of_the_rank():
    model = tiny_llama()
    LoRA(rank=16, alpha=8, rslora=True).attach(model)
    assert {layer.scaling for _, layer in adapted_linears(model)} == {8 / math.sqrt(16)}


def test_all_linear_is_every_linear_of_the_blocks_and_not_the_head():
    names = chosen()
    assert len(names) == 14
    assert {name.rpartition(".")[2] for name in names} == set(LLAMA_LEAVES)


def test_attention_is_the_four_projections_of_each_block():
    names = chosen(targets="attention")
    assert len(names) == 8
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("q_proj",), 2), (("q_*", "v_proj"), 4), (("model.layers.1.*",), 7), (("*.mlp.*",), 6), (("lm_head",), 1), ("down_proj", 2)],
)
def test_targets_are_leaf_names_or_patterns(targets, count):
    assert len(chosen(targets=targets)) == count


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("q_prj",), 'method.targets: no linear layer is called "q_prj"; did you mean "q_proj"?'),
        (("query_key_value_x",), "this model has: down_proj, gate_proj"),
        ("all_linear", 'did you mean "all-linear"?'),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_with_a_hint(targets, words):
    with pytest.raises(RecipeError) as error:
        chosen(targets=targets)
    assert words in str(error.value)


def test_all_unmatched_targets_are_named_at_once():
    with pytest.raises(RecipeError) as error:
        chosen(targets=("q_prj", "q_proj", "vproj"))
    assert len(error.value.problems) == 2


def test_ranks_can_differ_by_target_and_the_first_match_counts():
    model = tiny_llama()
    LoRA(rank=4, rank_per_target={"model.layers.1.*": 8, "q_proj": 2}).attach(model)
    ranks = {name: layer.rank for name, layer in adapted_linears(model)}
    assert ranks["model.layers.0.self_attn.q_proj"] == 2
    assert ranks["model.layers.1.self_attn.q_proj"] == 8
    assert ranks["model.layers.0.mlp.up_proj"] == 4


def test_a_rank_for_no_target_and_a_rank_too_large_are_errors():
    with pytest.raises(RecipeError, match=r'method.rank_per_target: "lm_head" matches none of the 14'):
        LoRA(rank_per_target={"lm_head": 2}).attach(tiny_llama())
    with pytest.raises(RecipeError, match=r"method.rank = 33: is more than model.layers.0.self_attn.k_proj can have \(32\)"):
        LoRA(rank=33).attach(tiny_llama())


def test_A_and_B_are_bfloat16_over_a_bfloat16_base():
    model = tiny_llama("4 bit", torch.bfloat16)
    LoRA(rank=4).attach(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    assert trainable_count(model) == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))


def test_the_same_seed_gives_the_same_start():
    starts = []
    for _ in range(2):
        model = tiny_llama()
        torch.manual_seed(5)
        LoRA(rank=4).attach(model)
        starts.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*starts)
