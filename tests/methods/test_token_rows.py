"""Trained rows of single tokens: what they compute and learn is what a whole dense vocabulary computes and learns of these rows."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlite.methods.base import trainable_tensors
from qlite.methods.token_rows import RowsLinear, head_tied_to, rows_to_train, train_rows
from qlite.methods.whole import train_whole
from qlite.model.load import Base
from tests.families import FAMILIES, saved_folder
from tests.marks import slow

# Scaled embeddings, a bias on the head, one tensor for both, soft-capping, and the plainest.
NAMES = ("llama", "qwen2", "gemma", "phi", "gemma2")
TIED = ("qwen2", "gemma", "gemma2")
TOKENS = [77, 5, 9]
IDS = torch.tensor([[5, 30, 9, 9, 41, 77, 5, 12], [9, 8, 7, 6, 5, 4, 3, 77]])
DELTA = "token_adapter.trainable_tokens_delta"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("families")
    return {name: saved_folder(tmp, FAMILIES[name]) for name in NAMES}


def loaded(folder: Path, bits: int) -> nn.Module:
    base = Base(model=str(folder), bits=16, embedding_bits=bits, head_bits=bits, dtype="float32", fused=False, cache=False)
    return base.load(torch.device("cpu"), lambda *_: None).model


def loss_of(model: nn.Module) -> Tensor:
    logits = model(input_ids=IDS).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", [NAMES[0], *map(slow, NAMES[1:])])
def test_the_rows_compute_and_learn_as_those_of_a_dense_vocabulary_do(name, bits, folders):
    rows, dense = loaded(folders[name], bits), loaded(folders[name], bits)
    layers = rows_to_train(rows, TOKENS, set())
    assert len(layers) == 2 - (name in TIED)
    head, embedding = dense.get_output_embeddings(), dense.get_input_embeddings()
    names = {module: dotted for dotted, module in dense.named_modules()}
    train_rows(rows, layers)
    train_whole(dense, [names[embedding], names[head]])
    generator = torch.Generator().manual_seed(1)
    drawn = {layer: torch.randn(3, 64, generator=generator) * 0.3 for layer in layers}
    order = sorted(TOKENS)
    with torch.no_grad():
        for layer in (names[embedding], names[head]):
            values = drawn.get(layer, drawn[names[embedding]])
            dense.get_submodule(layer).weight[order] = values
        for layer, values in drawn.items():
            rows.get_submodule(layer).token_adapter.trainable_tokens_delta.copy_(values)
    losses = [loss_of(model) for model in (rows, dense)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    for loss in losses:
        loss.backward()
    assert set(trainable_tensors(rows)) == {f"{layer}.{DELTA}" for layer in layers}
    for layer in layers:
        expected = dense.get_submodule(layer).weight.grad[order]
        if name in TIED:
            expected = expected + dense.get_submodule(names[head]).weight.grad[order]
        found = rows.get_submodule(layer).token_adapter.trainable_tokens_delta.grad
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_a_tied_heads_rows_are_the_embeddings_own_and_stand_under_its_name(folders):
    model = loaded(folders["qwen2"], 16)
    assert head_tied_to(model) == "lm_head"
    train_rows(model, rows_to_train(model, TOKENS, set()))
    head = model.lm_head
    assert isinstance(head, RowsLinear)
    assert head.is_tied
    assert head.token_adapter is model.model.embed_tokens.token_adapter
    assert list(trainable_tensors(model)) == [f"model.embed_tokens.{DELTA}"]
