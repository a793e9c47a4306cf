"""Every optimizer a recipe can name steps, and goes on with the same bits after its state was saved and loaded."""

import pytest
import torch
from torch import nn

from qlite.errors import RunError
from qlite.optim.build import Optimizer
from qlite.optim.schedule import Schedule

NAMES = ["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "lion8bit", "torch_adamw"]
CPU = torch.device("cpu")


def params(dtype=torch.bfloat16) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((64, 80), (16, 8))]


def build(name: str, tensors: list[nn.Parameter], notes: list[str] | None = None):
    said = [] if notes is None else notes
    return Optimizer(name=name, lr=1e-2, weight_decay=0.1).build([{"params": tensors, "lr": 1e-2}], CPU, said.append)


def step(optimizer, tensors: list[nn.Parameter], number: int) -> None:
    torch.manual_seed(number)
    sum((p.float() * torch.randn(p.shape)).sum() for p in tensors).backward()
    optimizer.step()


def test_the_list_is_all_there_is():
    assert set(Optimizer.__dataclass_fields__["name"].type.__args__) == set(NAMES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_resumed_it_takes_the_same_steps_bit_for_bit(name, dtype):
    through, halves = params(dtype), params(dtype)
    one, two = build(name, through), build(name, halves)
    for number in range(4):
        step(one, through, number)
    for number in range(2):
        step(two, halves, number)
    tensors, numbers = two.state()
    saved = {key: value.clone() for key, value in tensors.items()}
    resumed = [nn.Parameter(p.detach().clone()) for p in halves]
    three = build(name, resumed)
    three.load_state(saved, numbers)
    for number in range(2, 4):
        step(three, resumed, number)
    assert all(torch.equal(a, b) for a, b in zip(through, resumed, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(through, params(dtype), strict=True))


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("place", ["open", "counted", "close"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_ran_out_of_memory_goes_on_where_it_stood(name, place, number):
    def built(tensors: list[nn.Parameter]):
        groups = [{"params": [tensor], "lr": lr} for tensor, lr in zip(tensors, (1e-2, 3e-2, 2e-2), strict=True)]
        return Optimizer(name=name, weight_decay=0.1).build(groups, CPU, lambda _: None)

    def three() -> list[nn.Parameter]:
        return [*params(), *params(torch.float32)[1:]]

    def run_out(*_: float) -> None:
        raise torch.OutOfMemoryError

    def count_and_run_out() -> None:
        if middle.master.grad is None:
            inner_step()
        else:  # both libraries count a step before they make it
            optimizer.inner.state[middle.master]["step"] += 1
            run_out()

    through, tensors = three(), three()
    untroubled, optimizer = built(through), built(tensors)
    middle, inner_step = optimizer.flats[1], optimizer.inner.step
    for step_number in range(1, 5):
        step(untroubled, through, step_number)
        if step_number == number:
            with pytest.MonkeyPatch.context() as monkeypatch:
                if place == "counted":
                    monkeypatch.setattr(optimizer.inner, "step", count_and_run_out)
                else:
                    monkeypatch.setattr(middle, place, run_out)
                with pytest.raises(torch.OutOfMemoryError):
                    step(optimizer, tensors, step_number)
            optimizer.step()
        else:
            step(optimizer, tensors, step_number)
    assert all(torch.equal(a, b) for a, b in zip(through, tensors, strict=True))
    states = [one.state() for one in (untroubled, optimizer)]
    assert all(torch.equal(tensor, states[1][0][key]) for key, tensor in states[0][0].items())
    assert states[0][1] == states[1][1]
    assert all(not flat.grad.any() and flat.master.grad is None and not flat.master.numel() for flat in optimizer.flats)


def test_one_master_at_a_time_exists(monkeypatch):
    optimizer = Optimizer(name="adamw").build([{"params": [p], "lr": 1e-2} for p in params()], CPU)
    open_masters = []
    inner = optimizer.inner.step

    def watched() -> None:
        open_masters.append([flat.master.numel() for flat in optimizer.flats])
        inner()

    monkeypatch.setattr(optimizer.inner, "step", watched)
    optimizer.step()
    assert open_masters == [[64 * 80, 0], [0, 16 * 8]]


def test_torch_adamw_is_the_papers_algorithm():
    # Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, one step in float64.
    tensors = params(torch.float32)
    start = torch.cat([p.detach().double().flatten() for p in tensors])
    optimizer = build("torch_adamw", tensors)
    torch.manual_seed(0)
    grad = torch.cat([torch.randn(p.shape).double().flatten() for p in tensors])
    step(optimizer, tensors, 0)
    expected = start * (1 - 1e-2 * 0.1) - 1e-2 * grad / (grad.abs() + 1e-8)
    torch.testing.assert_close(torch.cat([p.detach().double().flatten() for p in tensors]), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_bitsandbytes_optimizers_agree_with_torchs(name):
    ours, reference = params(), params()
    one, two = build(name, ours), build("torch_adamw", reference)
    for number in range(5):
        step(one, ours, number)
        step(two, reference, number)
    moved = torch.cat([p.float().flatten() for p in ours]) - torch.cat([p.float().flatten() for p in params()])
    wanted = torch.cat([p.float().flatten() for p in reference]) - torch.cat([p.float().flatten() for p in params()])
    assert (moved - wanted).norm() / wanted.norm() < (0.01 if name == "adamw" else 0.1)


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_without_paged_memory_the_unpaged_twin_is_used_and_said_once(name):
    notes = []
    optimizer = build(name, params(), notes)
    assert len(notes) == 1
    assert f'"{name}"' in notes[0]
    assert f'"{name.removeprefix("paged_")}"' in notes[0]
    assert not optimizer.inner.is_paged


def test_clipping_bounds_the_norm_over_all_groups():
    first, second = params()
    optimizer = Optimizer(name="adamw").build([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 2.0}], CPU)
    optimizer.flats[0].grad.fill_(3.0)
    optimizer.flats[1].grad.fill_(4.0)
    norm = optimizer.clip(1.0)
    assert norm.item() == pytest.approx((9 * first.numel() + 16 * second.numel()) ** 0.5)
    clipped = torch.cat([flat.grad for flat in optimizer.flats])
    assert clipped.norm().item() == pytest.approx(1.0, rel=1e-4)
    assert optimizer.clip(0.0).item() == pytest.approx(1.0, rel=1e-4)


def test_each_group_keeps_its_own_learning_rate():
    first, second = params()
    optimizer = Optimizer(name="adamw").build([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 16.0}], CPU)
    assert optimizer.set_lr_factor(0.5) == 0.5
    assert [group["lr"] for group in optimizer.inner.param_groups] == [0.5, 8.0]


def test_state_of_other_parameters_is_refused():
    tensors = params()
    optimizer = build("adamw", tensors)
    step(optimizer, tensors, 0)
    with pytest.raises(RunError, match="--fresh"):
        build("adamw", params()[:1]).load_state(*optimizer.state())


def test_eight_bit_state_takes_a_quarter_of_the_bytes():
    sizes = {}
    for name in ("adamw", "adamw8bit"):
        tensors = [nn.Parameter(torch.zeros(256 * 256, dtype=torch.bfloat16))]
        optimizer = build(name, tensors)
        step(optimizer, tensors, 0)
        sizes[name] = sum(t.nbytes for key, t in optimizer.state()[0].items() if "state" in key)
    assert sizes["adamw"] == 4 * sizes["adamw8bit"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_schedule_warms_up_and_decays(name, expected):
    schedule = Schedule(name=name, warmup_steps=2)
    assert [schedule.factor(step, 6) for step in range(1, 7)] == pytest.approx(expected, abs=1e-6)


def test_a_decay_ends_at_its_final_ratio():
    schedule = Schedule(name="linear", final_ratio=0.1)
    assert schedule.factor(1, 10) == 1
    assert schedule.factor(11, 10) == pytest.approx(0.1)
