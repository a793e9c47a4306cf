"""A base model's architecture and its files' dtypes, known without reading a weight: all that planning its memory needs."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from qlite.model.checkpoint import open_checkpoint
from qlite.model.folder import read_config
from qlite.model.known import known_config
from qlite.model.load import Base, dense_shapes
from qlite.model.source import ModelFiles, cached, locate
from qlite.model.wheel import Progress


@dataclass(frozen=True)
class BaseShapes:
    """What a base model will look like in memory."""

    config: PreTrainedConfig
    origin: str
    """Where that is known from, in words."""
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    """The dtype of each tensor of its files; empty where these are not at hand, and bfloat16 is assumed."""

    @property
    def is_tied(self) -> bool:
        """Whether embedding and head are one tensor."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    def checkpoint(self, model: PreTrainedModel, make: Callable[[str, tuple[int, ...], torch.dtype], Tensor]) -> "ShapesOnly":
        """Return what can be read like ``model``'s files, each tensor made by ``make(name, shape, dtype)`` when it is asked for."""
        shapes = {name: shape for name, shape in dense_shapes(model).items() if name not in model.all_tied_weights_keys}
        # By name, as files are usually written, but block 2 before block 10: then a few blocks load like all of them.
        shapes = {name: shapes[name] for name in sorted(shapes, key=_with_numbers)}
        return ShapesOnly(shapes, {name: self.dtypes.get(name, torch.bfloat16) for name in shapes}, make)


@dataclass(frozen=True)
class ShapesOnly:
    """A checkpoint whose tensors have shapes and dtypes and no values."""

    _shapes: dict[str, tuple[int, ...]]
    _dtypes: dict[str, torch.dtype]
    _make: Callable[[str, tuple[int, ...], torch.dtype], Tensor]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def order(self) -> list[str]:
        return list(self._shapes)

    @property
    def nbytes(self) -> int:
        return sum(torch.Size(shape).numel() * self._dtypes[name].itemsize for name, shape in self._shapes.items())

    def read(self, name: str) -> Tensor:
        return self._make(name, self._shapes[name], self._dtypes[name])


def _with_numbers(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def base_shapes(base: Base, progress: Progress) -> BaseShapes:
    """Return ``base``'s shapes from its files' headers if they are here, else from the table of usual models, else from the hub.

    Raises:
        ModelError: there is no such model, or its config cannot be used.
    """
    files = cached(base.model, base.revision)
    if files is not None:
        return _from_files(files)
    known = known_config(base.model)
    if known is not None:
        return BaseShapes(known, "the table of usual models (its files are not here)")
    return _from_files(locate(base.model, base.revision, base.sha256, progress, weights=False))


def _from_files(files: ModelFiles) -> BaseShapes:
    if files.gguf is None and not any(files.folder.glob("*.safetensors")):
        return BaseShapes(read_config(files), "its config.json (its weights are not here)")
    checkpoint = open_checkpoint(files)
    return BaseShapes(checkpoint.config(), "its files", checkpoint.dtypes())
