"""Open a finished run: its base, quantised as in training, with the trained adapter on it or off."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from qlite import device
from qlite.data.dataset import DataSet
from qlite.data.encode import Encoder
from qlite.errors import RunError, printable
from qlite.formats.peft import load_adapter
from qlite.methods.base import Method
from qlite.model.load import LoadedBase
from qlite.model.lowering import lower_memory
from qlite.model.originals import original_weights
from qlite.model.wheel import Progress
from qlite.recipe.schema import Recipe
from qlite.training.provenance import other_company, require_same_base, require_same_keys
from qlite.training.run_folder import RunFolder


@dataclass(frozen=True)
class OpenRun:
    """A run's recipe, its loaded base and the encoder it was trained with; the adapter is put on by ``attach``."""

    run: RunFolder
    recipe: Recipe
    base: LoadedBase
    encoder: Encoder
    device: torch.device
    method: Method
    """The recipe's, with the ids of the tokens that it names."""

    def attach(self) -> None:
        """Put the trained adapter on the base. Raises AdapterError if it does not fit."""
        original = original_weights(self.base)
        self.method.attach(self.base.model)
        load_adapter(self.run.adapter, self.base.model)
        self.method.settle(self.base.model, original)
        lower_memory(self.base.model, self.recipe.memory, self.device)
        self.base.model.requires_grad_(False).eval()

    def note_other_rows(self, data: DataSet, note: Callable[[str], None]) -> None:
        """Tell ``note`` where ``data``, its rows as they are now, is not what the run began with."""
        try:
            self.run.check_identity({**data.identity, "base.model": self.base.identity})
        except RunError:
            note("the data or its encoding is not what it was when the run began: rows held out now may have been trained on")


def _to_stderr(message: str) -> None:
    print(printable(message), file=sys.stderr)


def open_run(
    run: RunFolder,
    device_name: str,
    progress: Progress,
    note: Callable[[str], None] = _to_stderr,
    base_changes: dict[str, object] | None = None,
) -> OpenRun:
    """Load the base of ``run`` on the device called ``device_name``, without the adapter; ``note`` hears what the user should know of it.

    ``base_changes``: other values for keys of [base] than it was trained with, to compute in more digits.

    Raises:
        AdapterError: the adapter was trained over other files, or with other keys, than the run's folder names now.
    """
    recipe = run.recipe()
    require_same_keys(run.adapter, recipe, run.path / "recipe.toml")
    recipe = replace(recipe, base=replace(recipe.base, **(base_changes or {})))
    where = device.pick_device(device_name)
    device.keep_freed_memory()
    # "flash" and "flex" are for training on a card; what was trained with them may be opened without one.
    base = replace(recipe.base, attention="auto").load(where, progress, recipe.memory)
    require_same_base(run.adapter, base)
    recipe.base.compile(where, progress)
    method = recipe.method.resolved(base.tokenizer)
    encoder = Encoder(base.tokenizer, run.template, recipe.data.loss_on)
    if encoder.template is not None:
        base.tokenizer.chat_template = encoder.template  # what an export writes beside the weights
    for other in other_company(run.adapter, base, base.tokenizer):
        note(other)
    return OpenRun(run, recipe, base, encoder, where, method)
