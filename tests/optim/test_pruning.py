"""What a restart does to the optimizer: parameters and their masters exactly what was given, and only the largest moments left."""

import pytest
import torch
from torch import nn

from qlite.optim.build import FlatOptimizer, Optimizer
from qlite.optim.flat import join_float32
from qlite.optim.pruning import prune_moments

NAMES = ("adamw", "adamw8bit", "lion8bit", "torch_adamw")


def stepped(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[FlatOptimizer, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in ((100, 30), (40, 70), (7, 9))]
    optimizer = Optimizer(name=name, lr=1e-2).build([{"params": params, "lr": 1e-2}], torch.device("cpu"))
    for _ in range(3):
        for p, total in optimizer.gradients().items():
            total.copy_(torch.randn(p.shape, generator=generator))
        optimizer.step()
    return optimizer, params


def moments(optimizer: FlatOptimizer) -> list[torch.Tensor]:
    """Return each moment in float32, flat."""
    state = optimizer.inner.state[optimizer.flats[0].master]
    found = []
    for name, code, sizes in (("state1", "qmap1", "absmax1"), ("state2", "qmap2", "absmax2"), ("exp_avg", "", ""), ("exp_avg_sq", "", "")):
        if isinstance(moment := state.get(name), torch.Tensor):
            flat = moment.flatten()
            is_packed = flat.dtype == torch.uint8
            found.append(state[code][flat.int()] * state[sizes].repeat_interleave(256)[: len(flat)] if is_packed else flat.clone())
    return found


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_numbers_of_one_parameter_are_zero_and_all_else_is_as_it_was(name, share):
    optimizer, params = stepped(name)
    before, place = moments(optimizer), optimizer.flats[0].place(params[1])
    assert len(before) == (1 if name == "lion8bit" else 2)
    prune_moments(optimizer.inner.state[optimizer.flats[0].master], place, share)
    after = moments(optimizer)
    dropped = after[0][place] == 0
    for old, new in zip(before, after, strict=True):
        others = torch.ones(len(old), dtype=torch.bool)
        others[place] = False
        assert torch.equal(new[others], old[others])
        assert torch.equal(new[place][~dropped], old[place][~dropped])
        assert not new[place][dropped & (share > 0)].any()
    assert abs(float(dropped.float().mean()) - share) < 0.05  # 8-bit codes have many equals
    first = before[0][place].abs()
    if dropped.any() and not dropped.all():
        assert first[~dropped].min() >= first[dropped].max()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "torch_adamw"])
def test_the_step_after_a_restart_is_no_larger_than_adams_first(name):
    """A's gradient is zero then, for B is: a first moment without its second would be divided by epsilon alone."""
    optimizer, params = stepped(name)
    values = {p: torch.zeros(p.shape) for p in params}
    optimizer.restart(values, 0.9)
    optimizer.step()
    assert max(float(p.abs().max()) for p in params) < 0.1  # 1e-2 a step, in Adam's own measure


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_restarted_parameter_and_its_master_are_exactly_what_was_given(dtype):
    optimizer, params = stepped("adamw8bit", dtype)
    others = [p.detach().clone() for p in params]
    value = torch.randn(params[1].shape, generator=torch.Generator().manual_seed(9))
    optimizer.restart({params[1]: value}, 1.0)
    flat = optimizer.flats[0]
    master = flat.weight if flat.remainder is None else join_float32(flat.weight, flat.remainder)
    assert torch.equal(master[flat.place(params[1])].view_as(value), value)
    assert torch.equal(params[1], value.to(dtype))
    assert all(torch.equal(params[i], others[i]) for i in (0, 2))
    # It is still the optimizer's: a step moves it.
    optimizer.gradients()[params[1]].fill_(1.0)
    optimizer.step()
    assert not torch.equal(params[1], value.to(dtype))
