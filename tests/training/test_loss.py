"""The chunked loss is cross entropy, whatever the chunk; its gradients reach hidden states and head alike."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qlite.data.batches import Batch
from qlite.data.encode import IGNORED
from qlite.model.head import logits_head
from qlite.training.loss import chunked_cross_entropy
from tests.tiny import tiny_llama

V, D = 50, 8


def plain(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, denominator: float) -> torch.Tensor:
    logits = head(hidden[:, :-1]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum") / denominator


def example(seed: int, batch: int, length: int, trained: float) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    labels = torch.randint(0, V, (batch, length))
    labels[torch.rand(batch, length) > trained] = IGNORED
    return nn.Linear(D, V), torch.randn(batch, length, D, requires_grad=True), labels


def chunked(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, denominator: float, chunk: int) -> torch.Tensor:
    batch = Batch(labels, labels, (labels.shape[1],) * len(labels))
    return chunked_cross_entropy(head, hidden, torch.from_numpy(batch.predicts), torch.from_numpy(batch.targets), denominator, chunk)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(2, 9), st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 30))
def test_loss_and_gradients_are_those_of_plain_cross_entropy(seed, batch, length, trained, chunk):
    head, hidden, labels = example(seed, batch, length, trained)
    wanted = plain(head, hidden, labels, 7.0)
    got = chunked(head, hidden, labels, 7.0, chunk)
    torch.testing.assert_close(got, wanted)
    inputs = [hidden, head.weight, head.bias]
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_frozen_head_gets_no_gradient_and_hidden_states_do():
    head, hidden, labels = example(0, 2, 6, 1.0)
    head.requires_grad_(False)
    chunked(head, hidden, labels, 1.0, 4).backward()
    assert head.weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_without_gradients_the_value_is_the_same():
    head, hidden, labels = example(0, 2, 6, 0.5)
    with torch.no_grad():
        value = chunked(head, hidden, labels, 3.0, 4)
    torch.testing.assert_close(value, plain(head, hidden, labels, 3.0))


@pytest.mark.parametrize("needs_grad", [True, False])
def test_logits_of_one_chunk_at_most_exist_at_a_time(needs_grad):
    head, hidden, labels = example(0, 4, 33, 1.0)
    rows = []

    class Spy(nn.Module):
        def forward(self, h):
            rows.append(h.shape[-2])
            return head(h)

    with torch.set_grad_enabled(needs_grad):
        chunked(Spy(), hidden, labels, 1.0, 16)
    assert rows == [16] * 8


def test_logits_become_their_gradient_where_they_lie_and_autograd_makes_no_copy():
    model = tiny_llama(vocab_size=V)
    head, hidden = logits_head(model), torch.randn(2, 6, model.config.hidden_size, requires_grad=True)
    labels = torch.randint(0, V, (2, 6))
    chunked(head, hidden, labels, 1.0, 4)  # what is done once
    with torch.profiler.profile() as profile:
        chunked(head, hidden, labels, 1.0, 4)
    names = [event.name for event in profile.events()]
    assert "MmBackward0" in names
    assert "AsStridedBackward0" not in names


def test_a_backward_factor_scales_the_gradient():
    head, hidden, labels = example(0, 2, 6, 1.0)
    (2.5 * chunked(head, hidden, labels, 1.0, 4)).backward()
    scaled = hidden.grad.clone()
    hidden.grad = None
    chunked(head, hidden, labels, 1.0, 4).backward()
    torch.testing.assert_close(scaled, 2.5 * hidden.grad)


def test_an_evaluation_computes_no_gradient_of_a_trained_head(monkeypatch):
    head, hidden, labels = example(0, 2, 6, 0.5)
    expected = chunked(head, hidden, labels, 3.0, 4)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a gradient is taken")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with torch.no_grad():
        torch.testing.assert_close(chunked(head, hidden.detach(), labels, 3.0, 4), expected)
