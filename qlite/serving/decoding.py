"""The passes of decoding that need the most memory: that over the prompts, and that of the last token of the longest answer."""

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def largest_passes(
    model: PreTrainedModel, rows: int, prompt: int, new: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield, by name, what runs ``rows`` prompts of ``prompt`` tokens, and then the last of ``new`` tokens on a cache of all the others.

    To be called in this order, as generation does: with the next token's logits in float32, twice.
    """
    model.eval()
    cache = DynamicCache(config=model.config)
    # Ids, their mask and positions are kept for all that has been read.
    ids, mask, positions = (torch.ones((rows, prompt + new - 1), dtype=torch.long, device=device) for _ in range(3))
    first, last = slice(0, prompt), slice(-1, None)
    yield "prompts", lambda: _read(model, ids[:, first], mask[:, first], positions[:, first], cache)
    if new > 1:
        yield "last token", lambda: _read_last(model, ids[:, last], mask, positions[:, last], cache, new - 2)


@torch.no_grad()
def _read(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> None:
    told = {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **told).logits
    scores = logits[:, -1].to(torch.float32, copy=True)
    scores.clone()  # what the processors of the scores return


@torch.no_grad()
def _read_last(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, between: int) -> None:
    """Read ``ids``, one token a row, as if ``between`` tokens had been read since the prompt."""
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is not None and between:
            shape = [*layer.keys.shape[:-2], between]
            grown = (layer.keys.new_zeros((*shape, layer.keys.shape[-1])), layer.values.new_zeros((*shape, layer.values.shape[-1])))
            cache.update(*grown, index)
    _read(model, ids, mask, positions, cache)
