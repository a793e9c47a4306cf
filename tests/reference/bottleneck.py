"""A block of a Llama with bottleneck adapters, written out: Houlsby et al. 2019, arXiv:1902.00751, section 2.1 and figure 2."""

import torch
from torch import Tensor, nn


def adapter(x: Tensor, tensors: dict[str, Tensor], place: str) -> Tensor:
    """Return x + U gelu(D x + d) + u, with the adapter's tensors as they are called behind the linear ``place``."""
    down, up = f"{place}.adapter_down", f"{place}.adapter_up"
    hidden = nn.functional.gelu(x @ tensors[f"{down}.weight"].T + tensors[f"{down}.bias"])
    return x + hidden @ tensors[f"{up}.weight"].T + tensors[f"{up}.bias"]


def states_of(model: nn.Module, ids: Tensor, tensors: dict[str, Tensor], has_attention_adapter: bool = True) -> Tensor:
    """Return the last hidden states of the plain Llama ``model`` with adapters on each sub-layer's output, before its residual is added."""
    decoder = model.model
    x = decoder.embed_tokens(ids)
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    angles = decoder.rotary_emb(x, positions)
    mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)[None, None]
    for number, block in enumerate(decoder.layers):
        attended, _ = block.self_attn(block.input_layernorm(x), position_embeddings=angles, attention_mask=mask)
        name = f"model.layers.{number}"
        x = x + (adapter(attended, tensors, f"{name}.self_attn.o_proj") if has_attention_adapter else attended)
        x = x + adapter(block.mlp(block.post_attention_layernorm(x)), tensors, f"{name}.mlp.down_proj")
    return decoder.norm(x)
