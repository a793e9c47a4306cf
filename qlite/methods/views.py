"""Several models over one set of frozen weights: each with modules of its own, in which an adapter can be put, and no weight twice."""

import copy
from types import MethodType

from torch import nn
from transformers import PreTrainedModel

from qlite.quant.embedding import QuantEmbedding
from qlite.quant.linear import QuantLinear


def view_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return another ``model`` over the very same tensors: what is put into one, or set to train, is not in the other.

    To be made before anything is attached. What holds a weight and has no parts (a linear, a norm) is shared as it is.
    """
    return _view(model, {})


def _view(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    if _holds_weights_alone(module):
        return module
    view = copy.copy(module)
    made[id(module)] = view
    own = {name: _own(value, module, view) for name, value in vars(module).items()}
    vars(view).update(own)
    view._modules = {name: child and _view(child, made) for name, child in module._modules.items()}
    return view


def _holds_weights_alone(module: nn.Module) -> bool:
    if isinstance(module, QuantLinear | QuantEmbedding):
        return True
    return not any(module.children()) and any(True for _ in module.parameters())


def _own(value: object, module: nn.Module, view: nn.Module) -> object:
    """Return what ``view`` has for an attribute of ``module``: dicts (of hooks, tensors) of its own, and methods bound to itself."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, view)
    return copy.copy(value) if isinstance(value, dict) else value
