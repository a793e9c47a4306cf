"""A base quantised once is kept on disk: the next run reads a quarter of the bytes and quantises nothing."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlite.errors import MachineError
from qlite.files import cache_folder, code_hash, drop_oldest, free_disk, mark_used, new_folder, short_hash, write_json, write_tensors
from qlite.model.lowering import MemoryKeys, modules_on_host
from qlite.model.wheel import Progress
from qlite.offload import keep_on_host, put, window
from qlite.units import GIB

CACHE_BYTES = 64 * GIB
"""All kept bases together; those used longest ago go first."""
HERE = Path(__file__).parent
LIBRARIES = ("torch", "bitsandbytes", "transformers")
TENSORS, NAMES = "tensors.safetensors", "names.json"


class BaseCache:
    """The place of one base in the cache: of these files, stored so, by these versions of the libraries."""

    def __init__(self, files: list[Path], stored: list[object], device: torch.device):
        """``stored``: whatever else decides the bits of the tensors, in JSON's types."""
        facts = {
            # Of all that makes a model's tensors.
            "code": code_hash([HERE, HERE.parent / "quant"], LIBRARIES),
            # Not their content, which takes as long to read as to quantise: a file that is written anew has another time.
            "files": [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file in files],
            "stored": stored,
            "device": device.type,
        }
        self._folder = cache_folder() / "bases" / short_hash(json.dumps(facts, sort_keys=True))

    def fill(self, model: PreTrainedModel, device: torch.device, progress: Progress, memory: MemoryKeys | None) -> bool:
        """Fill the empty ``model`` on ``device``, or where ``memory`` wants it; return whether this base was there, whole.

        If it was not, ``model`` may be filled in part.
        """
        try:
            # By the model's names; those that share a tensor have one name in the file.
            names: dict[str, str] = json.loads((self._folder / NAMES).read_text(encoding="utf-8"))
            self._fill(model, names, device, progress, memory)
        except (OSError, ValueError, AttributeError, KeyError, SafetensorError):
            return False
        mark_used(self._folder)
        return True

    def _fill(
        self, model: PreTrainedModel, names: dict[str, str], device: torch.device, progress: Progress, memory: MemoryKeys | None
    ) -> None:
        on_host, made, done = modules_on_host(model, memory) if memory else set(), {}, 0
        total = (self._folder / TENSORS).stat().st_size
        for prefix, module in model.named_modules():
            for name, empty in _own_tensors(module):
                stored = names[f"{prefix}.{name}" if prefix else name]
                if stored not in made:
                    made[stored] = self._read(stored, empty, device)
                    done += made[stored].nbytes
                    progress("load the quantised base", done, total)
                put(module, name, made[stored])
            if module in on_host:
                keep_on_host(module, device)

    def _read(self, stored: str, empty: Tensor, device: torch.device) -> Tensor:
        # One handle per tensor, as in SafetensorsCheckpoint.
        with safe_open(self._folder / TENSORS, "pt") as file:
            tensor = window(lambda: file.get_tensor(stored))
        if tensor.shape != empty.shape or tensor.dtype != empty.dtype:
            raise ValueError(f"{stored} is not what the model needs")
        new = tensor.to(device, copy=True)
        return nn.Parameter(new, requires_grad=False) if isinstance(empty, nn.Parameter) else new

    def write(self, model: PreTrainedModel) -> None:
        """Keep what ``model``, just loaded, holds, if that leaves as much free on the disk; a full or read-only one stops no run."""
        names, tensors, first = {}, {}, {}
        for prefix, module in model.named_modules():
            for own, tensor in _own_tensors(module):
                name = f"{prefix}.{own}" if prefix else own
                names[name] = first.setdefault(tensor, name)
                tensors[names[name]] = tensor
        if free_disk(self._folder) < 2 * sum(tensor.nbytes for tensor in tensors.values()):
            return
        with suppress(MachineError):
            with new_folder(self._folder) as folder:
                write_tensors(folder / TENSORS, tensors)
                write_json(folder / NAMES, names)
            drop_oldest(self._folder.parent, CACHE_BYTES, keep=self._folder)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of what a file holds of ``module`` without its children."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor
