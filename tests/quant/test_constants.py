"""Constants of a block's matrices that are made by one call are, bit for bit, those that each makes for itself."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlite.methods.lora import LoRA
from qlite.model.blocks import decoder_blocks
from qlite.model.lowering import lower_memory
from qlite.quant.constants import join_constants
from qlite.quant.linear import Packed4bit, Storage, overwrite_weight
from qlite.recipe.schema import Memory
from tests.tiny import one_batch, tiny_llama

SHAPES = [(64, 64), (64, 96), (320, 200), (48, 7)]
"""Of 64, 96, 1000 and 5.25 blocks: none a multiple of the 256 constants that share a scale."""
CPU = torch.device("cpu")


def matrices(double_quant: bool = True) -> list[Packed4bit]:
    torch.manual_seed(0)
    found = []
    for columns, rows in SHAPES:
        matrix = Storage(4, double_quant=double_quant).make(columns, rows, False, torch.bfloat16, "cpu")
        matrix.store(torch.randn(rows, columns) * (1 + len(found)))
        found.append(matrix)
    return found


def packed_of(module: nn.Module) -> list[Packed4bit]:
    return [each for each in module.modules() if isinstance(each, Packed4bit)]


class Calls(TorchDispatchMode):
    """How often block constants are made."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += "dequantize_blockwise" in str(func)
        return func(*args, **(kwargs or {}))


def test_joined_they_are_what_each_makes_for_itself_in_one_call_for_all():
    group, other = matrices(), matrices()[:2]
    wanted = [matrix.dense(torch.float32) for matrix in group]
    join_constants([group, other])
    with Calls() as calls:
        found = [matrix.dense(torch.float32) for matrix in group]
        assert calls.made == 1
        assert all(torch.equal(matrix.dense(torch.float32), dense) for matrix, dense in zip(other, wanted, strict=False))
        assert calls.made == 2
        # Another block's lie there now.
        found += [matrix.dense(torch.float32) for matrix in group]
        assert calls.made == 3
    assert all(map(torch.equal, found, wanted + wanted))
    assert all(torch.equal(matrix.rows(torch.tensor([3])), dense[[3]].bfloat16()) for matrix, dense in zip(group[:3], wanted, strict=False))


def test_the_codes_take_no_more_memory_than_their_padding():
    group = matrices()
    join_constants([group])
    (storage,) = {matrix.absmax.untyped_storage() for matrix in group}
    assert storage.nbytes() == sum(-(-matrix.absmax.numel() // 256) * 256 for matrix in group)
    assert group[0].share_of_constants.latest.values.numel() == storage.nbytes()


@pytest.mark.parametrize("way", ["written over", "stored anew", "moved"])
def test_a_matrix_that_has_other_codes_goes_without(way):
    group = matrices()
    join_constants([group])
    kept = [matrix.dense(torch.float32) for matrix in group]
    weight = 9 * torch.randn(64, 64) + 1
    alone = matrices()[0]
    alone.store(weight)
    if way == "written over":
        overwrite_weight(group[0], weight)
    elif way == "stored anew":
        group[0].store(weight)
    else:
        for name, tensor in alone.packed_tensors().items():
            setattr(group[0], name, tensor)
    assert torch.equal(group[0].dense(torch.float32), alone.dense(torch.float32))
    assert all(torch.equal(matrix.dense(torch.float32), dense) for matrix, dense in zip(group[1:], kept[1:], strict=True))


def test_what_is_not_double_quantised_or_alone_is_left_as_it_is():
    plain, (single, *_) = matrices(double_quant=False), matrices()
    join_constants([plain, [single], []])
    assert not any(matrix.share_of_constants for matrix in [*plain, single])


def test_a_copy_of_a_model_makes_its_own():
    model = tiny_llama("4 bit")
    join_constants(map(packed_of, decoder_blocks(model).values()))
    twin, ids = copy.deepcopy(model), torch.arange(8)[None]
    wanted = model(input_ids=ids).logits
    overwrite_weight(packed_of(model)[0], torch.zeros(64, 64))
    assert torch.equal(twin(input_ids=ids).logits, wanted)
    assert not any(matrix.share_of_constants for matrix in packed_of(twin))


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_a_step_makes_each_blocks_constants_once_a_pass_and_its_gradient_is_the_same(checkpointing):
    found = {}
    for is_joined in (False, True):
        model = tiny_llama("4 bit", num_hidden_layers=3)
        LoRA(rank=4).attach(model)
        for number, parameter in enumerate(each for each in model.parameters() if each.requires_grad):
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(number))
        lower_memory(model.train(), Memory(checkpointing=checkpointing), CPU)
        if not is_joined:
            for matrix in packed_of(model):
                matrix.share_of_constants = None
        with Calls() as calls:
            model(input_ids=one_batch().input_ids).logits.square().mean().backward()
        found[is_joined] = torch.cat([each.grad.flatten() for each in model.parameters() if each.requires_grad]), calls.made
    (alone, each_time), (joined, together) = found.values()
    assert torch.equal(joined, alone)
    assert each_time >= 2 * 3 * 7 - 7
    assert together == 2 * 3 - 1  # the last block's backward pass follows its forward pass
