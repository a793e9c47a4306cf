"""The flat float32 master of bfloat16 weights: exact, and the parameters are views of it."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from torch import nn

from qlite.optim.flat import FlatParameters, join_float32, split_float32

# Below the last 2^-8 of the float32 range: beyond it, rounding to nearest bfloat16 gives infinity.
finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**127), max_value=2.0**127)


@given(arrays("float32", 8, elements=finite))
def test_weight_and_remainder_are_the_float32_bit_for_bit(values):
    master = torch.from_numpy(values.copy())
    assert torch.equal(join_float32(*split_float32(master)).view(torch.int32), master.view(torch.int32))


@given(arrays("float32", 8, elements=finite))
def test_the_weight_is_a_nearest_bfloat16(values):
    master = torch.from_numpy(values.copy())
    weight, _ = split_float32(master)
    assert torch.equal((weight.double() - master.double()).abs(), (master.bfloat16().double() - master.double()).abs())


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
@pytest.mark.parametrize("high", [0x3F80, 0x3F81, 0xBF80, 0xBF81, 0x0000])
def test_every_kind_of_remainder_is_kept(high, low):
    bits = (high << 16) | low
    master = torch.tensor([bits - (1 << 32) if bits >= 1 << 31 else bits], dtype=torch.int32).view(torch.float32)
    assert torch.equal(join_float32(*split_float32(master)).view(torch.int32), master.view(torch.int32))


def test_small_updates_add_up_where_plain_bfloat16_loses_them_all():
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    plain = param.detach().clone()
    flat = FlatParameters([param])
    for _ in range(100):
        flat.open()
        flat.master.data.add_(1e-4)  # a fortieth of the last digit at 1
        flat.close()
        plain.add_(1e-4)
    assert torch.equal(plain, torch.ones(4, dtype=torch.bfloat16))
    torch.testing.assert_close(param.float(), torch.full((4,), 1.01), atol=2**-8, rtol=0)


def test_parameters_keep_shape_and_values_and_share_one_buffer():
    values = [torch.randn(3, 5).bfloat16(), torch.randn(7).bfloat16()]
    params = [nn.Parameter(v.clone()) for v in values]
    flat = FlatParameters(params)
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
    assert flat.size == 22
    flat.weight.zero_()
    assert all(not p.any() for p in params)


def test_gradients_are_summed_in_float32():
    param = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    flat = FlatParameters([param])
    for value in (256.0, 1.0, 1.0, 1.0):  # bfloat16 cannot tell 257 from 256
        (param * value).sum().backward()
    assert flat.grad.item() == 259.0
    assert param.grad is None


def test_between_steps_the_float32_values_do_not_exist():
    flat = FlatParameters([nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))])
    flat.open()
    assert flat.master.numel() == 64
    flat.close()
    assert flat.master.numel() == 0
