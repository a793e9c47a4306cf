"""Prefixes, prompts and gated prompts in every family: padded, packed, decoded with a cache, beyond sliding windows; or refused by name."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from qlite.errors import ModelError, RecipeError
from qlite.methods import METHODS
from qlite.methods.base import adapters_off, trainable_tensors
from qlite.model import documents
from qlite.model.checkpointing import checkpoint_blocks
from qlite.model.documents import DOCUMENTS, attend_by_documents
from qlite.model.head import hidden_states
from tests.families import FAMILIES, VOCAB, new_model

# Longer than the sliding windows of the families here, which are 8.
IDS = torch.randint(3, VOCAB, (2, 21), generator=torch.Generator().manual_seed(1))
METHOD_OF = {
    "prefix": METHODS["prefix"](length=3, hidden=8),
    "prompt": METHODS["prompt"](length=3),
    "llama_adapter": METHODS["llama_adapter"](length=3, first_block=0),
}
OTHER_ATTENTION = "set base.attention"
REFUSED = {
    **{("prefix", family): OTHER_ATTENTION for family in ("qwen3_5", "gemma2", "stablelm", "gptj", "falcon")},
    **{("llama_adapter", family): OTHER_ATTENTION for family in ("qwen3_5", "gemma2", "stablelm", "gptj", "falcon")},
    **{("llama_adapter", family): "one linear for queries" for family in ("phi3", "gpt_neox")},
    **{("llama_adapter", family): "norms the keys of all heads" for family in ("olmo2", "cohere")},
    ("prompt", "gemma4"): "an embedding of the tokens of its own",
}
# Prompts of the whole model where attention is transformers' own: all but packed lines.
PADDED_ONLY = {"qwen3_5", "gemma2", "stablelm", "gptj", "falcon"}
TAKEN = [(name, family) for name in METHOD_OF for family in FAMILIES if (name, family) not in REFUSED]
taken = pytest.mark.parametrize(("name", "family"), TAKEN)


def adapted(name: str, family: str) -> PreTrainedModel:
    model = new_model(FAMILIES[family]).requires_grad_(False)
    attend_by_documents(model)
    METHOD_OF[name].attach(model)
    generator = torch.Generator().manual_seed(3)
    for p in trainable_tensors(model).values():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_what_cannot_be_is_refused_with_its_reason(name, family):
    with pytest.raises((RecipeError, ModelError), match=REFUSED[name, family]):
        adapted(name, family)


@taken
def test_all_that_is_trained_counts_and_checkpointing_changes_no_gradient(name, family):
    plain = new_model(FAMILIES[family])(input_ids=IDS).logits
    found = []
    for is_checkpointed in (False, True):
        model = adapted(name, family).train()
        for dropout in (module for module in model.modules() if isinstance(getattr(module, "dropout", None), float)):
            dropout.dropout = 0.0  # OPT's
        if is_checkpointed:
            checkpoint_blocks(model, keep_attention=model.config._attn_implementation == DOCUMENTS)
        logits = model(input_ids=IDS, use_cache=False).logits
        assert (logits - plain).abs().max() > 1e-3
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        found.append({key: p.grad for key, p in trainable_tensors(model).items()})
    assert all(grad is not None and grad.abs().sum() > 0 for grad in found[0].values())
    assert all(torch.equal(grad, found[1][key]) for key, grad in found[0].items())


@taken
def test_left_padding_never_reaches_a_real_token(name, family):
    model = adapted(name, family)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :4], mask[1, :4] = 2, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True).logits[1, 4:]
        alone = model(input_ids=ids[1:, 4:]).logits[0]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)


@taken
def test_a_packed_document_is_what_it_is_alone(name, family):
    model = adapted(name, family)
    positions = torch.tensor([[*range(5), *range(16)], [*range(12), *range(9)]])
    if family in PADDED_ONLY:
        with pytest.raises(ModelError, match="train.packing = false"):
            hidden_states(model, IDS, positions)
        return
    packed = hidden_states(model, IDS, positions)
    assert packed.shape[:2] == (2, 21)
    for row, cut in ((0, 5), (1, 12)):
        for part in (slice(0, cut), slice(cut, None)):
            alone = hidden_states(model, IDS[row : row + 1, part])
            torch.testing.assert_close(packed[row : row + 1, part], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHOD_OF)
def test_a_cards_kernel_of_many_documents_is_told_where_each_begins(name, monkeypatch):
    """In its place, what flash attention documents: causal from the bottom right, each document's queries on its own keys."""
    calls = []

    def kernel(query, key, value, bounds_q, bounds_k, most_q, most_k, scale=None, **_):
        calls.append(1)
        lengths = [bounds.diff().tolist() for bounds in (bounds_q, bounds_k)]
        assert [max(each) for each in lengths] == [most_q, most_k]
        out = []
        for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            later = torch.ones(len(q), len(k), dtype=torch.bool).triu(1 + len(k) - len(q))
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v))
        return torch.cat(out)

    positions = torch.tensor([[*range(5), *range(16)], [*range(12), *range(9)]])
    model = adapted(name, "llama")
    want = hidden_states(model, IDS, positions)
    monkeypatch.setattr(documents, "varlen_attn", kernel)
    monkeypatch.setattr(documents, "_varlen_takes", lambda *_: True)
    monkeypatch.setattr(documents, "_varlen_options", dict)
    torch.testing.assert_close(hidden_states(model, IDS, positions), want, atol=1e-5, rtol=1e-4)
    assert len(calls) == len(model.model.layers)


@taken
def test_cached_decoding_equals_one_full_pass(name, family):
    model = adapted(name, family)
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        cache, got = DynamicCache(config=model.config), []
        for part in (slice(0, 11), *(slice(i, i + 1) for i in range(11, 21))):
            got.append(model(input_ids=IDS[:, part], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=1e-4)


@taken
def test_switched_off_the_model_is_its_base(name, family):
    model, want = adapted(name, family), new_model(FAMILIES[family])(input_ids=IDS).logits
    with adapters_off(model):
        torch.testing.assert_close(model(input_ids=IDS).logits, want, atol=1e-6, rtol=1e-6)
