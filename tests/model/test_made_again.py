"""With memory.checkpointing = "elementwise" norms and SwiGLU are made again: the same bits, and just what they gave is not held."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from qlite.errors import ModelError
from qlite.model.elementwise import origin_of
from qlite.model.fusing import fuse
from qlite.recipe.schema import Memory
from tests.model.watch import LAYERS, Watch, adapt, are_equal, gradient, ids, loss_of
from tests.tiny import tiny_llama

AGAIN = Memory(checkpointing="elementwise")
NONE = Memory(checkpointing="none")


def model_of(memory: Memory, storage: str = "4 bit", **method) -> PreTrainedModel:
    model = tiny_llama(storage, torch.float32, num_hidden_layers=LAYERS)
    fuse(model)
    return adapt(model, memory, **method)


class Ops(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "method",
    [{}, {"dropout": 0.3}, {"dora": True}, {"targets": ["q_proj", "down_proj"]}, {"targets": ["up_proj", "v_proj"], "dropout": 0.2}],
    ids=str,
)
@pytest.mark.parametrize("storage", ["16 bit", "4 bit"])
def test_the_bits_are_those_of_keeping_all(storage, method):
    loss, expected = gradient(model_of(NONE, storage, **method))
    model = model_of(AGAIN, storage, **method)
    for _ in range(2):
        found, gradients = gradient(model)
        assert torch.equal(found, loss)
        assert are_equal(gradients, expected)


def test_it_goes_together_with_tiled_mlps():
    loss, expected = gradient(model_of(Memory(checkpointing="none", mlp_chunk=7)))
    found, gradients = gradient(model_of(Memory(checkpointing="elementwise", mlp_chunk=7)))
    assert torch.equal(found, loss)
    assert are_equal(gradients, expected)


def test_what_is_held_less_is_what_norms_and_swiglu_gave():
    def held(memory: Memory) -> int:
        model = model_of(memory)
        with Watch() as watch:
            loss = loss_of(model, ids())
            found = watch.device_bytes
        assert loss.requires_grad
        return found

    config, tokens = model_of(NONE).config, 2 * 20
    norms = 2 * LAYERS - 1  # the first block's first is given what needs no gradient: the embedding's rows, which nobody else keeps
    assert held(NONE) - held(AGAIN) == tokens * 4 * (norms * config.hidden_size + LAYERS * config.intermediate_size)


def test_each_is_made_once_more_and_no_product_is():
    counts = []
    for memory in (NONE, AGAIN):
        model = model_of(memory)
        with Ops() as ops:
            loss_of(model, ids()).backward()
        counts.append(ops.count)
    more = {name: number - counts[0][name] for name, number in counts[1].items() if number != counts[0][name]}
    assert {name: number for name, number in more.items() if not name.startswith("aten::")} == {
        "qlite::rms_norm": 2 * LAYERS - 1,
        "qlite::swiglu": LAYERS,
    }
    assert not {"aten::mm", "aten::addmm", "aten::addmm_", "bitsandbytes::dequantize_4bit"} & more.keys()


def test_without_a_gradient_nothing_is_remembered():
    model = model_of(AGAIN)
    norm = model.model.layers[1].input_layernorm
    states = torch.randn(1, 3, model.config.hidden_size, requires_grad=True)
    assert origin_of(norm(states)) is not None
    with torch.no_grad():
        assert origin_of(norm(states)) is None
    assert origin_of(norm(states.detach())) is None


def test_a_model_of_which_nothing_is_fused_is_refused():
    with pytest.raises(ModelError, match=r'checkpointing = "elementwise": no norm or MLP of this "llama" is fused.* "none" or "block"'):
        adapt(tiny_llama("16 bit"), AGAIN)
