"""Attention inside documents: several of them lie in one line, and none sees another.

transformers finds the documents by position ids that restart at 0 and masks the T x T scores of a line, all of which are
computed all the same. The attention of this file computes each document's own scores and nothing else; it stands beside
transformers' own under the name ``DOCUMENTS``, and without documents it is transformers' SDPA (or, where that is slower, products).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from qlite.model.kept_attention import attending
from qlite.model.product_attention import sdpa_or_products
from qlite.offload import sent

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None

DOCUMENTS = "qlite_documents"


@dataclass(frozen=True)
class Documents:
    """The documents of a packed batch [B, T], line after line: none spans two lines."""

    lengths: tuple[int, ...]
    bounds: Tensor
    """[N + 1] int32, on the batch's device: where in the B * T tokens each document starts, and their end."""

    @classmethod
    def of(cls, position_ids: Tensor, device: torch.device) -> "Documents":
        """Return the documents of ``position_ids`` [B, T], counted from 0 in each. Where these are on the CPU, no device is waited for."""
        # In numpy, by DLPack: where a step is traced on fake tensors, no tensor operation gives a value, ``.numpy()`` included.
        positions = np.from_dlpack(position_ids if position_ids.device.type == "cpu" else position_ids.cpu()).reshape(-1)
        assert (positions[:: position_ids.shape[1]] == 0).all(), "every line starts with a document"
        bounds = np.append(np.flatnonzero(positions == 0), len(positions))
        lengths = np.diff(bounds)
        counted = np.arange(len(positions)) - np.repeat(bounds[:-1], lengths)
        assert np.array_equal(positions, counted), "positions count up by 1 in every document"
        return cls(tuple(lengths.tolist()), sent(torch.from_numpy(bounds).to(torch.int32), device))

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def longer(self, count: int) -> "Documents":
        """Return the documents with ``count`` more tokens at the beginning of each, all in one line."""
        before = count * torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=self.bounds.device)
        return Documents(tuple(length + count for length in self.lengths), self.bounds + before)

    def positions(self) -> Tensor:
        """Return the position of each token in its document, [1, B * T] int64, on the batch's device."""
        counted = np.concatenate([np.arange(length) for length in self.lengths])
        return sent(torch.from_numpy(counted), self.bounds.device).unsqueeze(0)

    def begun_with(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return ``tokens`` [B * T, ...] with ``rows`` [P, ...] before each document."""
        return torch.cat([part for own in tokens.split(self.lengths) for part in (rows, own)])

    def without_beginnings(self, count: int, tokens: Tensor) -> Tensor:
        """Return ``tokens`` [B * T, ...] without the first ``count`` of each document."""
        # Cut by one call, as below.
        sizes = [size for length in self.lengths for size in (count, length - count)]
        return torch.cat(tokens.split(sizes)[1::2])


def packed_inputs(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> dict:
    """Return the decoder's arguments that confine its attention to the documents of ``input_ids`` [B, T].

    Flash attention sees documents only in a batch of one line, so there all lines become one: [1, B * T].
    """
    documents = Documents.of(position_ids, input_ids.device)
    inputs = {"input_ids": input_ids, "position_ids": sent(position_ids, input_ids.device)}
    if model.config._attn_implementation == DOCUMENTS:
        return {**inputs, "documents": documents}
    if not is_flash_attention_requested(model.config):
        return inputs
    inputs = {name: ids.reshape(1, -1) for name, ids in inputs.items()}
    if model._supports_attention_backend:
        # Without these every layer would look for the documents anew, and wait for the device to find them.
        inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), documents.bounds)
        inputs |= dict.fromkeys(("max_length_q", "max_length_k"), documents.longest)
    return inputs


@contextmanager
def documents_told(are_there: bool) -> Iterator[None]:
    """Tell transformers whether lines hold several documents, where it cannot see for itself: it asks the positions for their values.

    For a step that is traced on tensors without values, and there alone.
    """
    find = masking_utils.find_packed_sequence_indices
    if not are_there:
        masking_utils.find_packed_sequence_indices = lambda _: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


def attend_by_documents(model: PreTrainedModel) -> None:
    """Let ``model`` use this file's attention in place of transformers' SDPA, where its family leaves all of that to the interface."""
    config = model.config.get_text_config()
    is_attention_only = set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
    # Doge computes with its mask; Gemma 4, where layers share keys, cuts it, and asks for the name "sdpa" before it does.
    touches_mask = config.model_type == "doge" or getattr(config, "num_kv_shared_layers", 0)
    if config._attn_implementation == "sdpa" and model._supports_attention_backend and is_attention_only and not touches_mask:
        # Both: a name without a mask function gets no mask at all.
        AttentionInterface.register(DOCUMENTS, documents_attention)
        AttentionMaskInterface.register(DOCUMENTS, documents_mask)
        model.set_attn_implementation(DOCUMENTS)


class DeferredMask(partial):
    """A mask [B, 1, T, T] that says "causal, inside documents", built only when it is called."""


def documents_mask(
    *,
    q_length: int,
    kv_length: int,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **others: object,
) -> Tensor | DeferredMask | None:
    """Return SDPA's mask, deferred where a packed line needs none: inside a document that is seen whole, causal says it all.

    transformers calls this with its mask's description. It forbids the skip where it has found documents, and sets
    ``use_vmap`` where a family adds a pattern of its own; ``local_size`` is the width of a sliding window.
    """
    lengths = {"q_length": q_length, "kv_length": kv_length, "local_size": local_size}
    mask = DeferredMask(sdpa_mask, **lengths, allow_is_causal_skip=allow_is_causal_skip, use_vmap=use_vmap, **others)
    found_documents = not allow_is_causal_skip and not use_vmap and q_length == kv_length
    sees_all = local_size is None or kv_length <= local_size
    return mask if found_documents and sees_all else mask()


def documents_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | DeferredMask | None,
    documents: Documents | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Return the attention's output [B, T, H, D] for ``query`` [B, H, T, D] and ``key``, ``value`` [B, H or fewer, T, D].

    Without ``documents``, or with a term that is added to the scores, this is SDPA under the whole mask. A mask that is a
    tensor (a sliding window) holds inside documents, too. What a method has put beside the attention (``module.side``) has its say.
    """
    side = module._modules.get("side")
    with attending(draws=bool(options.get("dropout", 0.0))):
        if side is None or side.is_off:
            return _attention(module, query, key, value, attention_mask, documents, options), None
        attend = partial(_attention, module, options=options)
        return side(attend, query, key, value, attention_mask, documents), None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | DeferredMask | None,
    documents: Documents | None,
    options: dict,
    before: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return ``documents_attention``'s output. ``before``: key and value [H or fewer, P, D] that all tokens see, whatever the mask says."""
    if before is not None:
        return _attention_after(partial(_attention, module, options=options), query, key, value, attention_mask, documents, before)
    is_plain = attention_mask is None or isinstance(attention_mask, DeferredMask)
    if documents is None or any(options.get(name) is not None for name in ("position_bias", "softcap")):
        mask = attention_mask() if isinstance(attention_mask, DeferredMask) else attention_mask
        return sdpa_or_products(module, query, key, value, mask, options)
    batch, _, width, _ = query.shape
    # Views of [B * T, heads, head size], where a document is a stretch whatever line it lies in.
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    if is_plain and _varlen_takes(query, key, value, options.get("dropout", 0.0)):
        bounds, longest = documents.bounds, documents.longest
        out = varlen_attn(*flat, bounds, bounds, longest, longest, scale=options.get("scaling"), **_varlen_options())
    else:
        masks = [None] * len(documents.lengths) if is_plain else _diagonal_blocks(attention_mask, documents, width)
        # Cut by one call, not by slices: a slice's gradient is as large as what it was cut from.
        parts = zip(*(x.split(documents.lengths) for x in flat), masks, strict=True)
        out = torch.cat([_one_document(module, *qkv, mask, options) for *qkv, mask in parts])
    return out.view(batch, width, *out.shape[1:])


def _attention_after(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | DeferredMask | None,
    documents: Documents | None,
    before: tuple[Tensor, Tensor],
) -> Tensor:
    """Return what ``attend`` gives with ``before`` at the beginning of the keys and values of each line, or of each document.

    Where causal says all, it counts as tokens, whose outputs nobody reads: there are as many queries as keys then, and where kernels
    differ in their diagonal (SDPA's starts at the top left, flash attention's ends at the bottom right) they do not. No mask is written.
    """
    count, batch, width = before[0].shape[1], len(query), query.shape[2]
    if documents is not None and not isinstance(mask, Tensor):
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
        rows = [query.new_zeros(count, *flat[0].shape[1:]), *(x.transpose(0, 1) for x in before)]
        q, k, v = (documents.begun_with(r, x).transpose(0, 1).unsqueeze(0) for r, x in zip(rows, flat, strict=True))
        longer = documents.longer(count)
        out = longer.without_beginnings(count, attend(q, k, v, None, longer).squeeze(0))
        return out.view(batch, width, *out.shape[1:])
    if documents is not None:
        return _masked_documents_after(attend, (query, key, value), mask, documents, before)
    mask = mask() if isinstance(mask, DeferredMask) else mask
    key, value = (torch.cat([x.expand(batch, -1, -1, -1), own], dim=2) for x, own in zip(before, (key, value), strict=True))
    if mask is None and width > 1:
        query = torch.cat([query.new_zeros(batch, query.shape[1], count, query.shape[3]), query], dim=2)
        return attend(query, key, value, None, None)[:, count:]
    return attend(query, key, value, None if mask is None else _seeing(mask, count), None)


def _masked_documents_after(
    attend: Callable[..., Tensor], qkv: tuple[Tensor, ...], mask: Tensor, documents: Documents, before: tuple[Tensor, Tensor]
) -> Tensor:
    """Return ``_attention_after`` of documents under a ``mask`` that says more than causal, one after the other."""
    batch, _, width, _ = qkv[0].shape
    flat = (x.transpose(1, 2).flatten(0, 1).split(documents.lengths) for x in qkv)
    parts = zip(*flat, _diagonal_blocks(mask, documents, width), strict=True)
    out = []
    for *own, block in parts:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in own)
        k, v = (torch.cat([x.unsqueeze(0), y], dim=2) for x, y in zip(before, (k, v), strict=True))
        out.append(attend(q, k, v, _seeing(block, before[0].shape[1]), None).squeeze(0))
    out = torch.cat(out)
    return out.view(batch, width, *out.shape[1:])


def _seeing(mask: Tensor, count: int) -> Tensor:
    """Return ``mask`` [B or 1, 1, Q, K], true where a query may look or added to the scores, with ``count`` keys before that all see."""
    return nn.functional.pad(mask, (count, 0), value=True if mask.dtype == torch.bool else 0.0)


def _one_document(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict) -> Tensor:
    """Return the attention [T, H, D] of one document of T tokens, causal or under ``mask`` [1, 1, T, T]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    return sdpa_or_products(module, q, k, v, mask, options).squeeze(0)


def _diagonal_blocks(mask: Tensor, documents: Documents, width: int) -> list[Tensor]:
    """Return what ``mask`` [B or 1, 1, T, T] says inside each document."""
    blocks, start = [], 0
    for length in documents.lengths:
        line, first = divmod(start, width)
        inside = slice(first, first + length)
        line = line if len(mask) > 1 else 0
        blocks.append(mask[line : line + 1, :, inside, inside])
        start += length
    return blocks


def _varlen_takes(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Return whether one kernel of torch's can do all documents: on CUDA, without dropout, where flash attention can run at all."""
    can_be_asked = query.is_cuda and _varlen_options() is not None and not dropout
    return can_be_asked and can_use_flash_attention(SDPAParams(query, key, value, None, dropout, True, True))


@cache
def _varlen_options() -> dict | None:
    """Return what this torch's kernel is told to be causal with several query heads to a key head; None: it has no such kernel."""
    names = inspect.signature(varlen_attn).parameters.keys() if varlen_attn is not None else ()
    if "window_size" not in names:
        return None
    # Where that is no option, heads may differ unasked (torch 2.11).
    return {"window_size": (-1, 0)} | ({"enable_gqa": True} if "enable_gqa" in names else {})
