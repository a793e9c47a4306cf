"""The step of decoding that needs the most memory: the last token of the longest answer, after the prompt's own pass."""

import torch
from transformers import DynamicCache, PreTrainedModel


@torch.no_grad()
def largest_decoding_step(model: PreTrainedModel, rows: int, prompt: int, new: int, device: torch.device) -> None:
    """Run ``rows`` prompts of ``prompt`` tokens, and then the last of ``new`` tokens on a cache of all the others, as generation does."""
    model.eval()
    cache = DynamicCache(config=model.config)
    mask = torch.ones((rows, prompt + new - 1), dtype=torch.long, device=device)
    ids = torch.zeros((rows, prompt), dtype=torch.long, device=device)
    model(input_ids=ids, attention_mask=mask[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    if new == 1:
        return
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "keys", None) is not None and new > 2:
            shape = [*layer.keys.shape[:-2], new - 2]
            grown = (layer.keys.new_zeros((*shape, layer.keys.shape[-1])), layer.values.new_zeros((*shape, layer.values.shape[-1])))
            cache.update(*grown, index)
    model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
