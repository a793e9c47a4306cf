"""What the keys of [memory] do on a card: the same gradient, less of its memory, pinned copies.

Run with pytest -n 0 -m gpu.
"""

import pytest
import torch
from torch import Tensor

from qlite.methods.base import trainable_tensors
from qlite.methods.lora import LoRA
from qlite.model.head import hidden_states
from qlite.model.lowering import lower_memory
from qlite.offload import Lane, frozen_tensors, is_host
from qlite.recipe.schema import Memory
from tests.model.watch import distance
from tests.tiny import tiny_llama
from tests.tiny_run import run, tiny_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]

SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
KEYS = [
    {"saved_inputs": "host"},
    {"saved_inputs": "8bit"},
    {"mlp_chunk": 100},
    {"embedding": "host"},
    {"base": "host"},
    {"saved_inputs": "host", "mlp_chunk": 100, "embedding": "host", "base": "host"},
]
CUDA = torch.device("cuda", 0)


def lowered(storage: str, keys: dict, dropout: float = 0.0) -> torch.nn.Module:
    """Return a small model on the card; where its base is to be on the host, it never was on the card as a whole."""
    memory = Memory(**keys)
    model = tiny_llama(storage, torch.bfloat16, **SIZES)
    model = model if memory.base == "host" else model.to(CUDA)
    torch.manual_seed(1)
    LoRA(rank=4, alpha=8.0, dropout=dropout).attach(model)
    lower_memory(model, memory, CUDA)
    for module in (model.model.norm, model.model.rotary_emb, model.lm_head):
        module.to(CUDA)
    if memory.embedding == "device":
        model.model.embed_tokens.to(CUDA)
    generator = torch.Generator().manual_seed(5)
    for p in trainable_tensors(model).values():
        p.data = (torch.randn(p.shape, generator=generator) * 0.05).to(p)
    return model.train()


def gradient(model: torch.nn.Module, tokens: int = 512) -> tuple[dict[str, Tensor], int]:
    """Return the gradient, and the most bytes that the pass allocated over what was there."""
    ids = torch.randint(0, 64, (2, tokens), generator=torch.Generator().manual_seed(2)).to(CUDA)
    torch.manual_seed(7)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    states = hidden_states(model, ids).float()
    (states * torch.linspace(-1, 1, states.numel(), device=CUDA).view(states.shape)).sum().backward()
    torch.cuda.synchronize()
    return {name: p.grad.cpu() for name, p in trainable_tensors(model).items()}, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("keys", KEYS, ids=lambda keys: "-".join(keys))
@pytest.mark.parametrize("storage", ["16 bit", "8 bit", "4 bit"])
def test_the_gradient_on_the_card_is_the_one_without_the_key(storage, keys, dropout):
    if dropout and "mlp_chunk" in keys:
        pytest.skip("tiles draw other masks")
    expected, _ = gradient(lowered(storage, {}, dropout))
    model = lowered(storage, keys, dropout)
    for _ in range(3):  # a race between the streams would not show every time
        for p in model.parameters():
            p.grad = None
        assert distance(gradient(model)[0], expected) < 0.03


def test_saved_inputs_leave_the_card():
    tokens = 8192
    _, plain = gradient(lowered("4 bit", {}), tokens)
    one = 2 * tokens * 256 * 2
    assert plain - gradient(lowered("4 bit", {"saved_inputs": "host"}), tokens)[1] > 4 * one
    assert plain - gradient(lowered("4 bit", {"saved_inputs": "8bit"}), tokens)[1] > 2 * one


def test_tiles_keep_the_mlp_small():
    _, plain = gradient(lowered("4 bit", {}), 8192)
    assert gradient(lowered("4 bit", {"mlp_chunk": 512}), 8192)[1] < 0.7 * plain


def test_a_streamed_base_is_never_on_the_card_as_a_whole():
    plain = lowered("16 bit", {})
    sizes = [sum(t.nbytes for _, _, t in frozen_tensors(block)) for block in plain.model.layers]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = lowered("16 bit", {"base": "host"})
    weights = torch.cuda.memory_allocated() - before
    assert weights < sizes[0]
    assert all(t.is_pinned() and is_host(t) for block in model.model.layers for _, _, t in frozen_tensors(block))
    assert gradient(model)[1] < gradient(plain)[1] + 2.2 * sizes[0]


def test_copies_wait_for_the_computation_and_the_computation_for_them():
    lane = Lane(CUDA)
    x = torch.ones(4096, 4096, device=CUDA)
    for _ in range(20):
        x = x @ torch.eye(4096, device=CUDA) + 1
        (kept,) = lane.send_to_host([x]).arrived()
        (back,) = lane.send_to_device([kept]).arrived()
        x = back
        assert kept.is_pinned()
    assert float(x.min()) == float(x.max()) == 21


@pytest.mark.parametrize("keys", KEYS, ids=lambda keys: "-".join(keys))
def test_a_run_on_the_card_trains_evaluates_and_answers(tmp_path, keys):
    recipe = tiny_recipe(tmp_path, parallel={"device": "cuda"}, memory=keys, train={"samples": ["abc"]})
    seen = run(recipe)
    assert seen.steps[-1].loss < seen.steps[0].loss
    assert len(seen.samples) > 0
