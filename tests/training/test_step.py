"""However a step is split into micro-batches, its gradient is the same; nothing that is not finite is ever stepped."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensor, FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from qlite.data.batches import Batch, batches_of
from qlite.errors import Diverged
from qlite.methods.base import trainable_tensors
from qlite.methods.lora import LoRA
from qlite.optim.build import FlatOptimizer, Optimizer
from qlite.training.step import Stepper
from tests.tiny import CONFIG, random_rows, tiny_llama

METHOD = LoRA(rank=4)


def stepper(dtype=torch.float32) -> tuple[Stepper, FlatOptimizer]:
    model = tiny_llama("4 bit", dtype)
    METHOD.attach(model)
    generator = torch.Generator().manual_seed(1)
    for p in trainable_tensors(model).values():
        p.data += 0.05 * torch.randn(p.shape, generator=generator).to(dtype)
    optimizer = Optimizer(name="torch_adamw").build(METHOD.param_groups(model, 1e-2), torch.device("cpu"))
    return Stepper(model, METHOD, 5, torch.device("cpu")), optimizer


STEPPER, OPTIMIZER = stepper()


def gradient(batches: list[Batch]) -> tuple[float, torch.Tensor]:
    OPTIMIZER.zero_grad()
    loss = STEPPER.accumulate(batches)
    return loss.item(), torch.cat([flat.grad for flat in OPTIMIZER.flats]).clone()


def double_stepper() -> Stepper:
    model = tiny_llama("16 bit", torch.float64)
    METHOD.attach(model)
    generator = torch.Generator().manual_seed(1)
    for p in trainable_tensors(model).values():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return Stepper(model, METHOD, 5, torch.device("cpu"))


DOUBLE = double_stepper()


def double_gradient(batches: list[Batch]) -> tuple[float, torch.Tensor]:
    trained = trainable_tensors(DOUBLE.model).values()
    for p in trained:
        p.grad = None
    loss = DOUBLE.accumulate(batches)
    return loss.item(), torch.cat([p.grad.flatten() for p in trained])


def apart(gradient_of: Callable, rows: list, order: list, size: int) -> float:
    """Return how far the gradients of ``rows`` at once, and of ``order`` in parts of ``size``, are from each other; the losses are equal.

    Against what is summed, not against the sum: gradients of rows may cancel, their rounding errors do not.
    """
    whole, split = gradient_of([Batch.of(rows, 0)]), gradient_of(list(batches_of(order, size, 0)))
    assert split[0] == pytest.approx(whole[0], rel=1e-6)
    tokens = sum(Batch.of([row], 0).trained_tokens for row in rows)
    alone = sum(gradient_of([Batch.of([row], 0)])[1].norm() * Batch.of([row], 0).trained_tokens / tokens for row in rows)
    return ((split[1] - whole[1]).norm() / alone).item()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(2, 8), st.data())
def test_any_split_of_a_step_gives_the_same_loss_and_gradient(seed, count, data):
    rows = random_rows(count, (2, 14), seed)
    order = data.draw(st.permutations(rows))
    # In float64, where nothing but the order of sums could tell: 2.4e-16 in 300 random splits.
    assert apart(double_gradient, rows, order, data.draw(st.integers(1, count))) <= 1e-14


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_so_it_does_over_a_4_bit_base(seed, size):
    rows = random_rows(5, (2, 14), seed)
    assert apart(gradient, rows, rows[::-1], size) <= 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(2, 9), st.data())
def test_any_packing_of_a_step_gives_the_same_loss_and_gradient(seed, count, data):
    rows = random_rows(count, (2, 14), seed)
    whole = gradient([Batch.of([row], 0) for row in rows])
    order = data.draw(st.permutations(rows))
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=3)))
    lines = [order[start:stop] for start, stop in zip([0, *cuts], [*cuts, count], strict=True)]
    packed = gradient([Batch.packed(lines[:2], 0), *([Batch.packed(lines[2:], 0)] if lines[2:] else [])])
    assert packed[0] == pytest.approx(whole[0], rel=1e-6)
    tokens = sum(Batch.of([row], 0).trained_tokens for row in rows)
    alone = sum(gradient([Batch.of([row], 0)])[1].norm() * Batch.of([row], 0).trained_tokens / tokens for row in rows)
    assert (packed[1] - whole[1]).norm() <= 4e-6 * alone  # attention sums in another order, too; a leak gives 0.2


def test_rows_that_saw_each_other_would_give_another_gradient():
    rows = random_rows(6, (10, 14), 0)
    whole, packed = gradient([Batch.of(rows, 0)])[1], Batch.packed([rows], 0)
    leaking = gradient([replace(packed, position_ids=None)])[1]
    assert (leaking - whole).norm() > 0.2 * whole.norm()
    assert (gradient([packed])[1] - whole).norm() < 1e-5 * whole.norm()


def test_a_mean_of_means_would_be_another_gradient():
    # The fault this guards against (transformers#34191): micro-batches of unequal length weighed alike.
    rows = random_rows(2, (4, 4), 0) + random_rows(2, (14, 14), 1)
    whole = gradient([Batch.of(rows, 0)])[1]
    parts = [gradient([batch])[1] for batch in batches_of(rows, 2, 0)]
    assert (sum(parts) / 2 - whole).norm() > 0.05 * whole.norm()


def test_the_loss_is_transformers_own():
    batch = Batch.of(random_rows(4, (3, 12), 2), 0)
    with torch.no_grad():
        wanted = STEPPER.model(input_ids=batch.input_ids, labels=batch.labels).loss
    assert STEPPER.evaluate([batch]) == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_step_asks_no_tensor_for_its_values(packing):
    # A memory plan traces it on fake tensors, which have none.
    rows = random_rows(4, (3, 12), 2)
    batch = Batch.packed([rows[:2], rows[2:]], 0) if packing else Batch.of(rows, 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).requires_grad_(False)
        METHOD.attach(model)
        loss = Stepper(model, METHOD, 5, torch.device("cpu")).accumulate([batch])
    assert isinstance(loss, FakeTensor)
    assert all(p.grad.shape == p.shape for p in trainable_tensors(model).values())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_stepped(poison):
    own, optimizer = stepper()
    tensors = trainable_tensors(own.model)
    next(iter(tensors.values())).data[0, 0] = poison
    before = {n: p.detach().clone() for n, p in tensors.items()}
    with pytest.raises(Diverged, match="not finite"):
        own.step([Batch.of(random_rows(2), 0)], optimizer, 1.0)
    assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in tensors.items())
    assert not any(flat.grad.any() for flat in optimizer.flats)
