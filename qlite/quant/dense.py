"""Dense copies of a layer of any storage: the whole layer, its matrix, or single rows of it."""

import copy

import torch
from torch import Tensor, nn

from qlite.quant.embedding import QuantEmbedding, matrix_of
from qlite.quant.linear import QuantLinear


@torch.no_grad()
def dense_copy(layer: nn.Module) -> nn.Module:
    """Return a copy of ``layer``, of its family's own class and dense in the dtype that it computes in, on its device."""
    if isinstance(layer, QuantLinear):
        return _dense_linear(layer)
    return _dense_embedding(layer) if isinstance(layer, QuantEmbedding) else _duplicate(layer)


def _duplicate(layer: nn.Module) -> nn.Module:
    # deepcopy would ask each tensor for the address of its bytes, and those of a traced model have none.
    tensors: dict[int, Tensor] = {id(tensor): tensor.clone() for tensor in layer.buffers()}
    tensors |= {id(tensor): nn.Parameter(tensor.clone()) for tensor in layer.parameters()}
    return copy.deepcopy(layer, tensors)


def _dense_linear(linear: QuantLinear) -> nn.Linear:
    dense = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, dtype=linear.compute_dtype, device="meta")
    dense.weight = nn.Parameter(linear.dense(linear.compute_dtype))
    if linear.bias is not None:
        dense.bias = nn.Parameter(linear.bias.clone())
    return dense


def _dense_embedding(embedding: QuantEmbedding) -> nn.Embedding:
    count, size, mark = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
    if embedding.family is None:
        dense = nn.Embedding(count, size, mark, device="meta")
    else:
        dense = _duplicate(embedding.family)
        del dense.weight
        dense.padding_idx = mark
    dense.weight = nn.Parameter(embedding.table.dense(embedding.table.compute_dtype))
    return dense


@torch.no_grad()
def dense_matrix(layer: nn.Module) -> Tensor:
    """Return the matrix of a linear or an embedding as a new float32 tensor."""
    matrix = matrix_of(layer)
    return layer.weight.detach().to(torch.float32, copy=True) if matrix is None else matrix.dense(torch.float32)


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """Return the shape of what ``dense_matrix`` returns."""
    matrix = matrix_of(layer)
    return tuple(layer.weight.shape) if matrix is None else (matrix.out_features, matrix.in_features)


@torch.no_grad()
def matrix_rows(layer: nn.Module, places: Tensor) -> Tensor:
    """Return the rows at ``places`` [N] of a linear's or an embedding's matrix, [N, in], in the dtype that it computes in: new memory."""
    matrix = matrix_of(layer)
    if matrix is None:
        return layer.weight.detach().index_select(0, places)
    # Rows that are no whole number of blocks cannot be read one by one.
    return matrix.rows(places) if matrix.row_step == 1 else matrix.dense(matrix.compute_dtype).index_select(0, places)
