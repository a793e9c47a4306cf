"""FLOPs, bytes and kernels are those of the arithmetic, on real and on fake tensors, and a card's time is the longer of two."""

import time

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from qlite.memory.cards import Card
from qlite.memory.work import BANDWIDTH_EFFICIENCY, LAUNCH_SECONDS, MATMUL_EFFICIENCY, Work
from tests.tiny import CONFIG, STORAGES, one_batch, tiny_llama

CARD = Card("test", vram_bytes=1, bandwidth=1e12, bf16_flops=1e14, fp32_flops=1e13)
TURING = Card("test", vram_bytes=1, bandwidth=1e12, bf16_flops=1e14, fp32_flops=1e13, has_bf16=False)


def count(function, *inputs: torch.Tensor) -> tuple[int, int, int]:
    with Work() as work:
        function(*inputs)
    return work.flops, work.bytes, work.kernels


def test_a_product_has_two_flops_for_each_pair_and_moves_its_three_matrices():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert count(torch.mm, a, b) == (2 * 3 * 5 * 7, 4 * (15 + 35 + 21), 1)


def test_a_linear_layers_backward_pass_has_twice_its_flops():
    x, layer = torch.ones(3, 5, requires_grad=True), nn.Linear(5, 7, bias=False)
    assert count(lambda: layer(x).sum().backward())[0] == 3 * (2 * 3 * 5 * 7)


@pytest.mark.parametrize(
    ("function", "moved"),
    [
        (lambda x: x + 1, 2),
        (lambda x: x + x, 3),
        (lambda x: x.add_(1), 2),
        (lambda x: x.clone(), 2),
        (lambda x: x.zero_(), 1),
        (lambda x: x.copy_(x), 2),
        (lambda x: torch.empty_like(x).copy_(x), 2),
        (lambda x: torch.add(x, 1, out=x), 2),
        (lambda x: torch.zeros_like(x), 1),
        (lambda x: torch.cat([x, x]), 4),
        (lambda x: torch._foreach_add_([x, x], 1), 4),
        (lambda x: x.view(-1)[None].expand(4, -1).clone(), 1 + 4),
        (lambda x: x[:1] + 1, 0.2),
    ],
)
def test_an_op_moves_what_it_reads_and_writes(function, moved):
    x = torch.ones(10, 10)
    assert count(function, x)[:2] == (0, round(moved * x.nbytes))


def test_views_questions_and_empty_tensors_are_nothing():
    x = torch.ones(4, 6)
    assert count(
        lambda: (x.view(24), x.t(), x[1:], x.split(2), x.unbind(), x.expand(2, 4, 6), x.detach(), x[0, 0].item(), torch.empty(9))
    ) == (0, 0, 0)


def test_a_lookup_reads_only_the_rows_that_it_returns():
    table, ids = torch.ones(1000, 8), torch.tensor([1, 2, 3])
    assert count(F.embedding, ids, table)[1] == ids.nbytes + 2 * 3 * 8 * 4
    assert count(lambda: table[ids])[1] == ids.nbytes + 2 * 3 * 8 * 4


def test_attention_is_counted_on_a_cpu_in_both_passes():
    q, k, v = (torch.ones(2, 3, length, 8, requires_grad=True) for length in (5, 9, 9))
    product = 2 * (2 * 3) * 5 * 9 * 8
    assert count(lambda: F.scaled_dot_product_attention(q, k, v))[0] == 2 * product
    out = F.scaled_dot_product_attention(q, k, v)
    assert count(lambda: out.sum().backward())[0] == 5 * product


def test_ops_that_come_whole_in_inference_mode_are_counted_by_their_parts():
    x, layer = torch.ones(3, 5), nn.Linear(5, 7)
    with torch.inference_mode():
        assert count(layer, x)[0] == 2 * 3 * 5 * 7


# A whole model


def model_flops(tokens: int) -> int:
    """Return the FLOPs of the tiny Llama's forward pass: two a weight and token, and two products over all pairs of tokens."""
    hidden, inner, keys = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["hidden_size"] // 2
    block = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    return CONFIG["num_hidden_layers"] * (2 * tokens * block + 4 * tokens**2 * hidden) + 2 * tokens * hidden * CONFIG["vocab_size"]


def test_a_models_flops_are_those_of_its_shapes():
    model, ids = tiny_llama(), torch.ones(1, 12, dtype=torch.long)
    assert count(model, ids)[0] == pytest.approx(model_flops(12), rel=0.002)  # the rotary table is a product, too
    with FlopCounterMode(display=False) as peer, Work() as work:
        tiny_llama(attn_implementation="eager")(ids)
    assert work.flops == peer.get_total_flops()


@pytest.mark.parametrize("storage", STORAGES)
def test_fake_tensors_are_counted_as_real_ones(storage):
    model, batch = tiny_llama(storage, torch.bfloat16), one_batch()

    def run(ids: torch.Tensor) -> Work:
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        with Work() as work:
            model(inputs_embeds=embedded).logits.float().logsumexp(-1).sum().backward()
        return work

    real = run(batch.input_ids)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run(mode.from_tensor(batch.input_ids))
    assert (fake.flops, fake.bytes, fake.kernels) == (real.flops, real.bytes, real.kernels)
    assert real.flops > 1.9 * model_flops(batch.input_ids.shape[1]) * len(batch.input_ids)


def test_a_packed_product_of_few_rows_has_its_flops():
    layer = STORAGES["4 bit"].make(64, 128, False, torch.bfloat16, "cpu")
    layer.store(torch.ones(128, 64))
    with torch.no_grad():
        assert count(layer, torch.ones(1, 64, dtype=torch.bfloat16))[0] == 2 * 64 * 128


def test_more_of_the_same_ops_are_drawn_on_from_two_counts():
    def layers(number: int) -> Work:
        x = torch.ones(4, 4)
        with Work() as work:
            for _ in range(number):
                x = (x @ x) + 1
        return work

    drawn, counted = layers(2).drawn_on(layers(3), 5), layers(7)
    assert (drawn.flops, drawn.bytes, drawn.kernels) == (counted.flops, counted.bytes, counted.kernels)
    assert drawn.seconds(CARD) == counted.seconds(CARD)


# Seconds


def test_a_large_product_takes_its_arithmetic_at_the_rate_of_its_type():
    times = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with FakeTensorMode(), Work() as work:
            a = torch.empty(4096, 4096, dtype=dtype)
            a @ a
        times[dtype] = [work.seconds(CARD), work.seconds(TURING)]
    fast, slow = (2 * 4096**3 / (MATMUL_EFFICIENCY * rate) for rate in (1e14, 1e13))
    assert times[torch.float16] == pytest.approx([fast, fast])
    assert times[torch.bfloat16] == pytest.approx([fast, slow])  # Turing's tensor cores have no bfloat16
    assert times[torch.float32] == pytest.approx([slow, slow])


def test_a_large_copy_takes_its_traffic_and_a_small_one_a_launch():
    with FakeTensorMode(), Work() as work:
        torch.empty(10**9).clone()
    assert work.seconds(CARD) == pytest.approx(8e9 / (BANDWIDTH_EFFICIENCY * 1e12))
    with Work() as work:
        for _ in range(3):
            torch.ones(1).clone()
    assert work.seconds(CARD) == pytest.approx(6 * LAUNCH_SECONDS)


def test_an_op_is_counted_in_little_time():
    x = torch.ones(4, 4)
    started = time.perf_counter()
    with Work() as work:
        for _ in range(5000):
            (x @ x) + 1
    assert work.kernels == 10_000
    assert time.perf_counter() - started < 3
