"""Layers that are trained whole: a dense copy in the place of the frozen one, under the names of PEFT's ``modules_to_save``.

What stands in the model is a layer of the family's own class, whose weights are trained and which keeps the frozen layer as ``base``.
So the model, and whoever reads it, finds the kind of layer that was there, and its tensors have the names that PEFT's files give them.
"""

from difflib import get_close_matches
from functools import cache

from torch import nn

from qlite.errors import RecipeError, shown
from qlite.methods.base import StandIn, matches, put_module
from qlite.quant.dense import dense_copy
from qlite.quant.embedding import QuantEmbedding
from qlite.quant.linear import QuantLinear


class Whole(StandIn):
    """Marks a layer all of whose tensors are trained."""


def select_whole(model: nn.Module, patterns: tuple[str, ...], adapted: set[str]) -> list[str]:
    """Return the dotted names of the layers that ``patterns`` name, in model order; ``adapted``: the linears that get an adapter.

    A layer is what holds weights and has no parts: a linear, an embedding, a norm, in any storage.

    Raises:
        RecipeError: a pattern names no layer, or one that gets an adapter.
    """
    layers = [name for name, module in model.named_modules() if _is_layer(module)]
    # What is inside a packed embedding is no layer of the model's.
    layers = [name for name in layers if not isinstance(_parent(model, name), QuantEmbedding)]
    chosen = [name for name in layers if any(matches(name, pattern) for pattern in patterns)]
    problems = [_unmatched(pattern, layers) for pattern in patterns if not any(matches(name, pattern) for name in layers)]
    problems += [
        f'method.modules_to_save: "{name}" is one of method.targets, too, and a layer is trained whole or adapted; leave it out of one'
        for name in chosen
        if name in adapted
    ]
    if problems:
        raise RecipeError(problems)
    return chosen


def train_whole(model: nn.Module, names: list[str]) -> None:
    """Put a trainable dense copy into the place of each layer of ``names``."""
    for name in names:
        put_module(model, name, whole_copy(model.get_submodule(name)))


def whole_copy(base: nn.Module) -> nn.Module:
    """Return a trainable copy of the layer ``base``, dense in the dtype that it computes in; it starts as ``base`` does."""
    layer = dense_copy(base)
    layer.__class__ = _trained_kind(type(layer))
    layer.requires_grad_(True)
    layer.base = base
    return layer


@cache
def _trained_kind(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (Whole, kind), {"__module__": kind.__module__})


def _is_layer(module: nn.Module) -> bool:
    holds = isinstance(module, QuantLinear | QuantEmbedding) or any(p.is_floating_point() for p in module.parameters(recurse=False))
    return holds and (isinstance(module, QuantEmbedding) or not any(module.children()))


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _unmatched(pattern: str, layers: list[str]) -> str:
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    close = get_close_matches(pattern, leaves, n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"this model has: {', '.join(leaves)}"
    return f'method.modules_to_save: no layer is called "{shown(pattern)}"; {hint}'
