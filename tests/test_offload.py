"""Host memory on a CPU: real copies, and a mark that says which side a tensor is on."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from qlite.offload import Lane, host_copy, is_host, keep_on_host, mark_host, put, to_device
from tests.model.watch import Watch

CPU = torch.device("cpu")


@pytest.mark.parametrize("is_fake", [False, True], ids=["real", "fake"])
def test_the_mark_is_of_the_memory_not_of_the_tensor(is_fake):
    mode = FakeTensorMode(allow_non_fake_inputs=True) if is_fake else torch.no_grad()
    with mode:
        given = torch.ones(6)
        kept = host_copy(given, CPU)
        view = kept.view(2, 3)
        parameter = nn.Parameter(kept, requires_grad=False)
        del kept
        gc.collect()
        assert is_host(view)
        assert is_host(parameter)
        assert is_host(view.untyped_storage())
        assert host_copy(view, CPU) is view
        assert not is_host(given)
        assert not is_host(view.clone())
        assert not is_host(view + 1)


def test_a_host_copy_is_known_as_such_from_its_first_moment():
    with Watch() as watch:
        kept = host_copy(torch.ones(1000), CPU)
    assert is_host(kept)
    assert watch.device_bytes == 0
    assert watch.peak == 4000  # the ones themselves


def test_what_a_lane_carries_arrives_and_both_ends_live_until_then():
    lane = Lane(CPU)
    given = torch.randn(3, 5).t()
    there = lane.send_to_host([given])
    end = weakref.ref(given.untyped_storage())
    expected = given.clone()
    del given
    assert end() is not None
    (kept,) = there.arrived()
    assert end() is None
    assert is_host(kept)
    (back,) = lane.send_to_device([kept]).arrived()
    assert not is_host(back)
    assert torch.equal(back, expected)
    assert back.stride() == expected.stride()
    assert back.data_ptr() != kept.data_ptr()


def test_only_what_is_frozen_moves_and_what_is_shared_stays_shared():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    module[0].weight.requires_grad_(False)
    module[1].weight = module[0].weight
    trained = module[0].bias
    keep_on_host(module, CPU)
    assert is_host(module[0].weight)
    assert module[1].weight is module[0].weight
    assert isinstance(module[0].weight, nn.Parameter)
    assert module[0].bias is trained
    assert not is_host(trained)
    assert is_host(module[2].running_mean)
    first = module[0].weight
    keep_on_host(module, CPU)
    assert module[0].weight is first


def test_an_empty_model_is_left_as_it_is():
    module = nn.Linear(4, 4, device="meta").requires_grad_(False)
    keep_on_host(module, CPU)
    assert module.weight.device.type == "meta"


def test_put_keeps_a_parameter_a_parameter_and_a_buffer_a_buffer():
    module = nn.BatchNorm1d(3).requires_grad_(False)
    put(module, "weight", torch.zeros(3))
    put(module, "running_mean", torch.ones(3))
    assert list(dict(module.named_parameters())) == ["weight", "bias"]
    assert not module.weight.requires_grad
    assert torch.equal(module.running_mean, torch.ones(3))
    assert "running_mean" in dict(module.named_buffers())


def test_rows_computed_on_the_host_are_copied():
    rows = torch.ones(2, 3)
    sent = to_device(rows, CPU)
    assert is_host(rows)
    assert not is_host(sent)
    assert torch.equal(sent, rows)
    assert mark_host(sent) is sent
