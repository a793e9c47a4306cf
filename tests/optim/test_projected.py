"""GaLore's projected parameters beside the paper's algorithm written out and beside the authors' own optimizer."""

import importlib

import pytest
import torch
from torch import Tensor, nn

from qlite.errors import RunError
from qlite.optim.build import FlatOptimizer, Optimizer
from qlite.optim.projected import ProjectedParameters, top_directions
from tests.reference.galore import GaLoreAdamW

SHAPES = ((24, 16), (16, 40), (12, 12))
OPTIONS = {"rank": 3, "update_every": 3, "scale": 0.5}
CPU = torch.device("cpu")


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def built(params: list[nn.Parameter], name: str = "adamw", **keys: float) -> FlatOptimizer:
    """Return the optimizer over ``params``. The reference has no eps."""
    return Optimizer(name=name, lr=1e-2, eps=1e-30, **keys).build([{"params": params, "lr": 1e-2, **OPTIONS}], CPU, lambda _: None)


def arrive(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    """Let ``grads`` come out of a backward pass."""
    sum((p * grad.to(p.dtype)).sum() for p, grad in zip(params, grads, strict=True)).backward()


@pytest.mark.parametrize("name", ["adamw", "torch_adamw"])
def test_seven_steps_over_three_projections_are_the_papers(name):
    params = weights()
    optimizer, wanted = built(params, name, weight_decay=0.1), [GaLoreAdamW(p.data, 3, 3, 0.5, 1e-2, decay=0.1) for p in weights()]
    for step in range(7):
        arrive(params, gradients(step))
        optimizer.step()
        for each, gradient in zip(wanted, gradients(step), strict=True):
            each.step(gradient)
    assert all(not torch.equal(p, start) for p, start in zip(params, weights(), strict=True))
    for p, each in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.data, each.weight, atol=1e-5, rtol=1e-4)


def test_seven_steps_are_those_of_the_authors_own_code(monkeypatch):
    galore_torch = pytest.importorskip("galore_torch.adamw", reason="galore-torch is not installed: pip install --no-deps galore-torch")
    projector = importlib.import_module("galore_torch.galore_projector")
    params, theirs, plain_svd = weights(), weights(), torch.linalg.svd

    def turned_svd(matrix: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        """A singular vector may be turned round; LAPACK's own choice would be another after each projection."""
        left, values, right = plain_svd(matrix, full_matrices=full_matrices)
        short = right.T if len(matrix) >= matrix.shape[1] else left
        signs = short.gather(0, short.abs().argmax(0, keepdim=True)).sign()
        return left * signs, values, right * signs.T

    monkeypatch.setattr(projector.torch.linalg, "svd", turned_svd)
    group = {"params": theirs, "rank": 3, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std"}
    reference = galore_torch.AdamW([group], lr=1e-2, eps=1e-30, weight_decay=0.1, no_deprecation_warning=True)
    optimizer = built(params, weight_decay=0.1)
    for step in range(7):
        arrive(params, gradients(step))
        optimizer.step()
        for p, gradient in zip(theirs, gradients(step), strict=True):
            p.grad = gradient
        reference.step()
    for mine, their in zip(params, theirs, strict=True):
        torch.testing.assert_close(mine.data, their.data, atol=1e-5, rtol=1e-4)


def test_directions_are_the_top_singular_ones_and_the_sign_is_told():
    for gradient in gradients(5):
        found = top_directions(gradient, 4).float()
        left, _, right = torch.linalg.svd(gradient)
        wanted = right[:4] if len(gradient) >= gradient.shape[1] else left[:, :4].T
        torch.testing.assert_close(found.abs(), wanted.abs(), atol=1e-5, rtol=1e-4)
        assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()
        assert torch.equal(top_directions(-gradient, 4).float(), found)


def test_micro_batches_add_up_in_the_first_ones_projection_and_leave_no_whole_gradient():
    params = weights()
    flat = ProjectedParameters(params, **OPTIONS)
    arrive(params, gradients(0))
    arrive(params, gradients(1))
    assert all(p.grad is None for p in params)
    assert flat.grad.numel() == 3 * (24 + 40 + 12)
    for (p, found), first, second in zip(flat.gradients(), gradients(0), gradients(1), strict=True):
        basis, total = top_directions(first, 3).float(), first + second
        wanted = total @ basis.T if len(p) >= p.shape[1] else basis @ total
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_updates_too_small_for_bfloat16_are_not_lost():
    params, exact = weights(torch.bfloat16), weights()
    optimizer = built(params)
    for p, other in zip(params, exact, strict=True):
        other.data = p.data.float()
    wanted = [GaLoreAdamW(p.data, 3, 3, 0.5, 1e-2) for p in exact]
    optimizer.set_lr_factor(1e-2)
    for each in wanted:
        each.lr *= 1e-2
    for step in range(6):
        arrive(params, gradients(step))
        optimizer.step()
        for each, gradient in zip(wanted, gradients(step), strict=True):
            each.step(gradient)
    master = torch.cat([p.data.float().flatten() for p in params]).view(torch.int32)
    kept = (master + optimizer.flats[0].remainder.int()).view(torch.float32)
    moved = torch.cat([each.weight.flatten() for each in wanted]) - torch.cat([p.data.flatten() for p in exact])
    found = kept - torch.cat([p.data.flatten() for p in exact])
    # The projections and the gradients are bfloat16: each a few parts in a thousand off.
    assert float((found - moved).norm() / moved.norm()) < 0.1
    lost = (torch.cat([p.data.float().flatten() for p in params]) - torch.cat([p.data.flatten() for p in exact]) - moved).norm()
    assert float(lost / moved.norm()) > 0.5


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit", "torch_adamw", "paged_adamw8bit"])
def test_any_optimizer_goes_on_with_the_same_bits(name):
    straight, params, again = weights(torch.bfloat16), weights(torch.bfloat16), weights(torch.bfloat16)
    first = built(straight, name)
    for step in range(5):
        arrive(straight, gradients(step))
        first.step()
        if step == 1:
            tensors, numbers = first.state()
            saved = {key: tensor.clone() for key, tensor in tensors.items()}, dict(numbers)
            held = [p.detach().clone() for p in straight]
    second = built(again, name)
    for p, value in zip(again, held, strict=True):
        p.data.copy_(value)
    second.load_state(*saved)
    for step in range(2, 5):
        arrive(again, gradients(step))
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(straight, params, strict=True))
    with pytest.raises(RunError, match="is not of these"):
        built(weights(), name).load_state(*saved)


def test_a_gradient_that_is_no_number_spoils_the_sum_and_no_projection():
    params = weights()
    optimizer = built(params)
    spoilt = gradients(0)
    spoilt[1][2, 3] = float("nan")
    arrive(params, spoilt)
    assert not torch.isfinite(optimizer.clip(1.0))
    optimizer.zero_grad()
    arrive(params, gradients(1))
    assert torch.isfinite(optimizer.clip(0))
    torch.testing.assert_close(optimizer.flats[0].bases[: 3 * 16].view(3, 16), top_directions(gradients(1)[0], 3).float())


def test_a_close_that_ran_out_of_memory_goes_on_where_it_stood(monkeypatch):
    params, whole, addmm, calls = weights(), weights(), torch.addmm, iter(range(99))
    optimizer, untroubled = built(params), built(whole)
    arrive(whole, gradients(0))
    untroubled.step()

    def failing(*args: Tensor, **options: float) -> Tensor:
        if next(calls) == 1:
            raise RuntimeError("out of memory")
        return addmm(*args, **options)

    arrive(params, gradients(0))
    monkeypatch.setattr("qlite.optim.projected.torch.addmm", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert [torch.equal(p, start) for p, start in zip(params, weights(), strict=True)] == [False, True, True]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, whole, strict=True))
