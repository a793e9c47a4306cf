"""The weights of a base model's own files, one at a time, under the names that the loaded model gives them."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlite.errors import ModelError
from qlite.model.load import LoadedBase, dense_shapes, own_names


class Originals:
    """What the files of ``checkpoint`` hold for ``model``: for a GGUF file, what its blocks stand for."""

    def __init__(self, model: PreTrainedModel, checkpoint, names: Iterable[str]):
        """``names``: those of the model's tensors, adapters taken off."""
        names = set(names)
        self._checkpoint = checkpoint
        self._source = {own: source for source, own in own_names(model, checkpoint.order(), names).items() if own}
        embedding, head = (_name_of(model, module) for module in (model.get_input_embeddings(), model.get_output_embeddings()))
        # A tied head has no tensor of its own in the file, or the embedding has none.
        for name, other in ((head, embedding), (embedding, head)):
            if name not in self._source and other in self._source:
                self._source[name] = self._source[other]

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor ``name`` of the model on the CPU, with all its file's digits, some rows at a time or whole.

        To be read only: they may be windows on the file.
        """
        return self._checkpoint.parts(self._source[name])


def original_weights(base: LoadedBase) -> Callable[[str], Tensor]:
    """Return what gives the weight [out, in] of a linear of ``base`` by its dotted name: float32, on the CPU, as its files have it.

    To be called before a method is attached; what it returns may be called afterwards.
    """
    originals = Originals(base.model, base.checkpoint, dense_shapes(base.model))

    def original(linear: str) -> Tensor:
        if f"{linear}.weight" not in originals:
            raise ModelError(f"base.model: its files hold no weight of {linear} alone, which the method begins with; choose another base")
        return torch.cat([part.to(torch.float32) for part in originals.parts(f"{linear}.weight")])

    return original


def _name_of(model: PreTrainedModel, wanted: object) -> str:
    return next((f"{name}.weight" for name, module in model.named_modules() if module is wanted), "")
