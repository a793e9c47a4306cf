"""With memory.checkpointing = "elementwise" norms and SwiGLU are made again: the same bits, and just what they gave is not held."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

from qlite.errors import ModelError
from qlite.methods.base import trainable_tensors
from qlite.methods.bottleneck import Bottleneck
from qlite.methods.ia3 import IA3
from qlite.methods.lora import LoRA
from qlite.methods.together import join
from qlite.methods.views import view_of
from qlite.model.elementwise import origin_of
from qlite.model.fusing import fuse
from qlite.model.lowering import lower_memory
from qlite.recipe.schema import Memory
from tests.model.watch import CPU, LAYERS, Watch, adapt, assert_same, gradient, ids, loss_of
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
    [{}, {"dropout": 0.3}, {"targets": ["q_proj", "down_proj"]}, {"targets": ["up_proj", "v_proj"], "dropout": 0.2}],
    ids=str,
)
@pytest.mark.parametrize("storage", ["16 bit", "4 bit"])
def test_the_bits_are_those_of_keeping_all(storage, method):
    assert_same(model_of(AGAIN, storage, **method), model_of(NONE, storage, **method), steps=2)


def test_it_goes_together_with_tiled_mlps():
    assert_same(model_of(Memory(checkpointing="elementwise", mlp_chunk=7)), model_of(Memory(checkpointing="none", mlp_chunk=7)))


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


def test_without_a_gradient_it_takes_no_more_than_keeping_all():
    peaks = []
    for memory in (NONE, AGAIN):
        model = model_of(memory).eval()
        with Watch() as watch, torch.no_grad():
            loss_of(model, ids())
        peaks.append(watch.peak)
    assert peaks[0] == peaks[1] > 0


def test_a_model_of_which_nothing_is_fused_is_refused():
    with pytest.raises(ModelError, match=r'checkpointing = "elementwise": no norm or MLP of this "llama" is fused.* "none" or "block"'):
        adapt(tiny_llama("16 bit"), AGAIN)


@pytest.mark.parametrize("method", [LoRA(rank=4, dora=True), IA3(), Bottleneck()], ids=lambda method: method.name)
def test_a_method_that_would_keep_as_much_is_refused(method):
    model = tiny_llama("16 bit")
    fuse(model)
    method.attach(model)
    with pytest.raises(ModelError, match=r"this method's linears keep what they are given otherwise than LoRA's"):
        lower_memory(model, AGAIN, CPU)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_several_adapters_in_one_pass_hold_as_much_less_and_give_the_same_bits(dropout):
    def trained(memory: Memory) -> tuple[list[torch.Tensor], int]:
        model = tiny_llama("4 bit", torch.float32, num_hidden_layers=LAYERS)
        fuse(model)
        views = [view_of(model) for _ in range(2)]
        for view in views:
            adapt(view, memory, dropout=dropout)
        groups = join(model, views)
        lower_memory(model, memory, CPU)
        groups.rows, groups.members = (1, 1), (0, 1)
        with Watch() as watch:
            loss = loss_of(model.train(), ids())
            held = watch.device_bytes
        loss.backward()
        return [p.grad for view in views for p in trainable_tensors(view).values()], held

    (expected, most), (found, less) = trained(NONE), trained(AGAIN)
    assert len(found) == 2 * 2 * 7 * LAYERS
    assert all(map(torch.equal, found, expected))
    config = model_of(NONE).config
    assert most - less == 40 * 4 * ((2 * LAYERS - 1) * config.hidden_size + LAYERS * config.intermediate_size)


def test_views_share_their_norms_and_all_of_them_may_ask():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Phi3ForCausalLM(Phi3Config(vocab_size=64, pad_token_id=0, **sizes)).requires_grad_(False)
    fuse(model)  # its norms; its MLP has one linear for gate and up
    for view in [view_of(model), view_of(model)]:
        adapt(view, AGAIN)
        assert all(each.abs().sum() > 0 for each in gradient(view)[1].values())
