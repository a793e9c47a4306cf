"""The passes of decoding that need the most memory: that over the prompts, and that of the last token of the longest answer."""

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
    mask = torch.ones((rows, prompt + new - 1), dtype=torch.long, device=device)
    ids = torch.zeros((rows, prompt), dtype=torch.long, device=device)
    yield "prompts", lambda: _read(model, ids, mask[:, :prompt], cache)
    if new > 1:
        yield "last token", lambda: _read_last(model, ids[:, :1], mask, cache, new - 2)


@torch.no_grad()
def _read(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache) -> None:
    logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    scores = logits[:, -1].to(torch.float32, copy=True)
    scores.clone()  # what the processors of the scores return


@torch.no_grad()
def _read_last(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache, between: int) -> None:
    """Read ``ids``, one token a row, as if ``between`` tokens had been read since the prompt."""
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is not None and between:
            shape = [*layer.keys.shape[:-2], between]
            grown = (layer.keys.new_zeros((*shape, layer.keys.shape[-1])), layer.values.new_zeros((*shape, layer.values.shape[-1])))
            cache.update(*grown, index)
    _read(model, ids, mask, cache)
