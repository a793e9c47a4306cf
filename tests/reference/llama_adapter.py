"""LLaMA-Adapter and its V2 restated as a whole Llama in plain torch, from arXiv:2303.16199, section 3.2, and arXiv:2304.15010, section 4.1.

As in the authors' code the gate is the tanh of a number for each head, and prompts' keys are not turned. All weights are those of
``tensors``, by the names that qlite's adapted model gives them.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig


def adapted_llama(tensors: dict[str, Tensor], config: LlamaConfig, ids: Tensor) -> Tensor:
    """Return the logits [B, T, V] for ``ids`` [B, T]."""

    def linear(name: str, x: Tensor) -> Tensor:
        """V2: y = s (W x + b); without s and b, y = W x."""
        if f"{name}.base.weight" not in tensors:
            return x @ tensors[f"{name}.weight"].T
        return tensors[f"{name}.scale"] * (x @ tensors[f"{name}.base.weight"].T + tensors[f"{name}.shift"])

    def norm(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * tensors[f"{name}.weight"]

    def heads(x: Tensor, count: int) -> Tensor:
        return x.view(*x.shape[:-1], count, -1).transpose(-2, -3)

    queries, keys = config.num_attention_heads, config.num_key_value_heads
    x = tensors["model.embed_tokens.weight"][ids]
    later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    for number in range(config.num_hidden_layers):
        block = f"model.layers.{number}"
        h, attention = norm(f"{block}.input_layernorm", x), f"{block}.self_attn"
        q = turned(heads(linear(f"{attention}.q_proj", h), queries), config.rope_parameters["rope_theta"])
        k = turned(heads(linear(f"{attention}.k_proj", h), keys), config.rope_parameters["rope_theta"])
        v = heads(linear(f"{attention}.v_proj", h), keys)
        scores = q @ repeated(k, queries // keys).transpose(-1, -2) / q.shape[-1] ** 0.5
        out = scores.masked_fill(later, -torch.inf).softmax(-1) @ repeated(v, queries // keys)
        if f"{attention}.side.prompt" in tensors:
            prompt = tensors[f"{attention}.side.prompt"]
            k, v = (repeated(heads(linear(f"{attention}.{which}_proj", prompt), keys), queries // keys) for which in "kv")
            gate = tensors[f"{attention}.side.gate"].tanh()[:, None, None]
            out = out + gate * (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(f"{attention}.o_proj", out.transpose(1, 2).flatten(2))
        h, mlp = norm(f"{block}.post_attention_layernorm", x), f"{block}.mlp"
        x = x + linear(f"{mlp}.down_proj", torch.nn.functional.silu(linear(f"{mlp}.gate_proj", h)) * linear(f"{mlp}.up_proj", h))
    return linear("lm_head", norm("model.norm", x))


def turned(x: Tensor, theta: float) -> Tensor:
    """Return x [B, heads, T, D] turned by rotary positions, the first half of D paired with the second."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1)


def repeated(x: Tensor, times: int) -> Tensor:
    """Return x [..., heads, T, D] with each head ``times`` times in a row."""
    return x.repeat_interleave(times, dim=-3)
