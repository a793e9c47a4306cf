"""What only a card can show: the CUDA paths agree with their CPU twins. Run with pytest -m gpu; never yet run on a card."""

import pytest
import torch

from qlite.optim.build import Optimizer
from qlite.training.run_folder import RunFolder
from tests.quant.test_linear import IN, STORAGES, stored
from tests.tiny_run import run, tiny_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("name", STORAGES)
def test_the_product_on_the_card_is_that_of_the_cpu(name, rows):
    layer, _ = stored(STORAGES[name], torch.bfloat16, bias=True)
    x = torch.randn(rows, IN, dtype=torch.bfloat16)
    want = layer(x).float()
    got = layer.to("cuda")(x.cuda()).cpu().float()
    assert (got - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_paged_optimizers_page_and_step(name):
    param = torch.nn.Parameter(torch.ones(200_000, dtype=torch.bfloat16, device="cuda"))
    notes: list[str] = []
    optimizer = Optimizer(name=name).build([{"params": [param], "lr": 1e-2}], torch.device("cuda"), notes.append)
    param.sum().backward()
    optimizer.step()
    assert notes == []
    assert (param < 1).all()


def test_a_run_on_the_card_learns_and_resumes(tmp_path):
    recipe = tiny_recipe(tmp_path, parallel={"device": "cuda"})
    run(recipe, stop_after=3)
    seen = run(recipe)
    assert seen.steps[-1].loss < seen.steps[0].loss
    assert seen.steps[0].memory.reserved > 0
    assert RunFolder(tmp_path / "run").is_finished
