"""The token embedding and the output head in few bits: which modules they are, what cannot be stored so, and the two as one tensor."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from qlite.errors import ModelError
from qlite.quant.embedding import matrix_of
from qlite.quant.linear import Packed, Storage


def token_embeddings(model: PreTrainedModel) -> Iterator[tuple[str, nn.Embedding]]:
    """Yield (name, module) of what maps token ids: the input embedding, and Gemma 4's of each layer, which is called after it."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    first = names[model.get_input_embeddings()]
    return ((name, module) for module, name in names.items() if name.startswith(first))


def refuse_unfit(model: PreTrainedModel, embedding: Storage, head: Storage, tables: Iterable[nn.Embedding]) -> None:
    """Return if the head and the embeddings ``tables`` of ``model`` can be stored as asked.

    Raises:
        ModelError: they cannot.
    """
    family = model.config.model_type
    if embedding.bits != head.bits and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise ModelError(
            f'base.embedding_bits = {embedding.bits} and base.head_bits = {head.bits}: this "{family}" has one tensor for both '
            "(tie_word_embeddings), which is stored in one way; give both the same"
        )
    if not isinstance(model.get_output_embeddings(), nn.Linear) and head.bits < 16:
        raise ModelError(f'base.head_bits = {head.bits}: the output head of the family "{family}" is no linear layer; set it to 16')
    for table in tables:
        size = table.embedding_dim
        if embedding.bits == 4 and size % embedding.block_size:
            divisor = math.gcd(size, 4096)
            other = f"base.block_size = {divisor}, which divides it, or " if divisor >= 32 else ""
            raise ModelError(
                f'base.embedding_bits = 4: a row of the embedding has {size} values in this "{family}", no whole number of blocks of '
                f"base.block_size = {embedding.block_size}; set {other}base.embedding_bits = 8"
            )


def tie_packed(model: PreTrainedModel, missing: set[str]) -> None:
    """Let a packed head and embedding that the config ties be one set of tensors, and take what this fills out of ``missing``.

    transformers ties parameters; what is tied here is no longer in its list.
    """
    for target, source in list(model.all_tied_weights_keys.items()):
        matrices = {name: matrix_of(model.get_submodule(name.rpartition(".")[0])) for name in (source, target)}
        if None in matrices.values():
            continue
        del model.all_tied_weights_keys[target]
        given, *others = sorted(matrices, key=missing.__contains__)
        if not missing.isdisjoint(others) or _are_equal(*matrices.values()):
            matrices[others[0]].share(matrices[given])
        if given not in missing:
            missing -= set(others)


def _are_equal(one: Packed, other: Packed) -> bool:
    """Return whether two packed matrices hold the same; one that was not filled does not."""
    pairs = zip(one.packed_tensors().values(), other.packed_tensors().values(), strict=True)
    return all("meta" not in (a.device.type, b.device.type) and torch.equal(a, b) for a, b in pairs)
