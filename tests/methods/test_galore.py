"""GaLore as a method: which gradients are projected, what its plan saves, what it refuses. Its steps: tests/optim/test_projected.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlite.errors import RecipeError
from qlite.memory import terms
from qlite.memory.ledger import Peak
from qlite.methods.galore import GaLore
from qlite.model.shapes import base_shapes
from qlite.optim.build import Optimizer
from qlite.optim.projected import ProjectedParameters
from qlite.recipe.read import build_recipe, read_recipe
from qlite.recipe.schema import Recipe
from qlite.training.forecast import STEP, forecast, worst_workload
from qlite.training.step import Stepper
from tests.methods.test_contract import IDS
from tests.tiny import one_batch, tiny_llama
from tests.tiny_run import tiny_tables

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_the_chosen_linears_are_projected_and_all_else_is_trained_plainly():
    model, method = tiny_llama(), GaLore(rank=4, targets=("q_proj", "*.1.mlp.*"))
    method.attach(model)
    groups = method.param_groups(model, 1e-3)
    names = {p: name for name, p in model.named_parameters()}
    projected = {names[p] for group in groups for p in group["params"] if "update_every" in group}
    assert projected == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)} | {
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    assert {names[p] for group in groups for p in group["params"]} == set(names.values())
    optimizer = Optimizer(name="torch_adamw").build(groups, CPU)
    assert [type(flat) for flat in optimizer.flats].count(ProjectedParameters) == 1


def test_a_head_that_is_the_embeddings_tensor_is_projected_where_it_is_a_target():
    model, method = tiny_llama(tie_word_embeddings=True), GaLore(rank=4, targets=("lm_head", "q_proj"))
    method.attach(model)
    projected = [p for group in method.param_groups(model, 1e-3) for p in group["params"] if "update_every" in group]
    assert {id(p) for p in projected} == {id(model.lm_head.weight), *(id(block.self_attn.q_proj.weight) for block in model.model.layers)}


def test_what_is_clipped_is_the_norm_of_the_projections():
    """A gradient that is projected to nearly its whole rank keeps nearly its norm; to rank 1, its largest singular value is left."""
    norms = {}
    for rank in (1, 31):
        model, method = tiny_llama(), GaLore(rank=rank, targets=("q_proj", "k_proj"))
        method.attach(model)
        optimizer = Optimizer(name="torch_adamw").build(method.param_groups(model, 1e-3), CPU)
        (flat,) = [flat for flat in optimizer.flats if isinstance(flat, ProjectedParameters)]
        Stepper(model, method, 4, CPU).accumulate([one_batch()])
        norms[rank] = flat.grad.norm()
        if rank == 1:
            plain = tiny_llama().requires_grad_(True)
            Stepper(plain, method, 4, CPU).accumulate([one_batch()])
            weights = [block.self_attn.get_submodule(name).weight for block in plain.model.layers for name in ("q_proj", "k_proj")]
            largest = torch.stack([torch.linalg.matrix_norm(weight.grad, 2) for weight in weights])
            whole = torch.stack([weight.grad.norm() for weight in weights]).norm()
    torch.testing.assert_close(norms[1], largest.norm(), atol=1e-5, rtol=1e-4)
    assert norms[1] < norms[31] <= whole * (1 + 1e-5)
    assert norms[31] > 0.99 * whole


def step_of(recipe: Recipe) -> Peak:
    return forecast(
        recipe, base_shapes(recipe.base, lambda *_: None), replace(worst_workload(recipe), held_out=None, answers=None)
    ).peaks()[STEP]


def test_the_plan_tells_what_the_projections_save(tmp_path):
    """Llama of width 64: per block 4 attention and 3 MLP linears, at rank 4; embedding, head and norms are as in full fine-tuning."""
    peaks, parts = {}, tiny_tables(tmp_path, base={"bits": 16}, optimizer={"name": "adamw"}, train={"exact_match_rows": 0})
    for name, method in (("full", {"name": "full"}), ("galore", {"name": "galore", "rank": 4})):
        peaks[name] = step_of(build_recipe({**parts, "method": method}, "tiny.toml"))
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)] * 2
    saved = sum(m * n - 4 * max(m, n) for m, n in shapes)
    projectors = sum(4 * min(m, n) for m, n in shapes)
    gradients, states = ({name: peak.terms[term] for name, peak in peaks.items()} for term in (terms.GRADIENTS, terms.OPTIMIZER))
    assert gradients["full"] - gradients["galore"] == 4 * saved
    assert states["full"] - states["galore"] == 8 * saved - 2 * projectors  # two float32 moments less, bfloat16 projectors more
    assert peaks["galore"].bytes < peaks["full"].bytes


@pytest.mark.slow
def test_on_a_model_of_135_million_weights_the_plan_is_a_third_lower():
    peaks = []
    for name in ("full", "galore"):
        keys = ["train.micro_batch=1", "train.exact_match_rows=0"]
        peaks.append(step_of(read_recipe(ROOT / "recipes" / "baselines" / f"{name}.toml", keys)).bytes)
    assert 0.6 < peaks[1] / peaks[0] < 0.72


def test_a_rank_that_projects_nothing_is_refused_by_key():
    with pytest.raises(RecipeError) as caught:
        GaLore(rank=32).attach(tiny_llama())
    assert str(caught.value).startswith(
        "method.rank = 32: model.layers.0.self_attn.k_proj has 32 rows or columns, so nothing would be projected"
    )
    model = tiny_llama()
    GaLore(rank=32, targets=("q_proj",)).attach(model)
    assert torch.equal(model(input_ids=IDS).logits, tiny_llama()(input_ids=IDS).logits)
