"""A tiny Llama for the tests: 2 layers of width 64 over 64 tokens, float32, frozen, its blocks in any storage."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qlite.data.batches import Batch
from qlite.data.encode import Encoded
from qlite.quant.linear import Storage

STORAGES = {"16 bit": Storage(16), "8 bit": Storage(8), "4 bit": Storage(4)}
CONFIG = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "sdpa",
}


def tiny_llama(storage: str = "16 bit", dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """Return the model with weights from seed 0, frozen."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, **changes})).to(dtype).requires_grad_(False)
    if storage != "16 bit":
        head = model.get_output_embeddings()
        for name, linear in list(model.named_modules()):
            if isinstance(linear, nn.Linear) and linear is not head:
                packed = STORAGES[storage].make(linear.in_features, linear.out_features, False, dtype, "cpu")
                packed.store(linear.weight.data)
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, packed)
    return model


def random_rows(count: int, lengths: tuple[int, int] = (3, 12), seed: int = 0, vocab: int = 64) -> list[Encoded]:
    """Return rows of random ids; the later half of each is trained."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        size = int(torch.randint(lengths[0], lengths[1] + 1, (1,), generator=generator))
        ids = torch.randint(0, vocab, (size,), generator=generator).tolist()
        rows.append(Encoded(ids, [i >= size // 2 for i in range(size)]))
    return rows


def one_batch(count: int = 2, seed: int = 0) -> Batch:
    """Return ``count`` random rows as one batch."""
    return Batch.of(random_rows(count, seed=seed), pad_id=0)
