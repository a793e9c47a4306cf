"""A base quantised once is kept on disk: the next run reads a quarter of the bytes and quantises nothing."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlite.errors import MachineError
from qlite.files import cache_folder, drop_oldest, mark_used, new_folder, write_json, write_tensors
from qlite.hashes import code_hash, short_hash
from qlite.model.lowering import MemoryKeys, modules_on_host
from qlite.model.wheel import Progress
from qlite.offload import keep_on_host, put, window
from qlite.room import free_disk
from qlite.units import GIB

CACHE_BYTES = 64 * GIB
"""All kept bases together; those used longest ago go first."""
HERE = Path(__file__).parent
LIBRARIES = ("torch", "bitsandbytes", "transformers")
TENSORS, NAMES = "tensors.safetensors", "names.json"
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
"""As safetensors writes them."""


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
            kept = json.loads((self._folder / NAMES).read_text(encoding="utf-8"))
            self._fill(model, kept["names"], kept["sums"], device, progress, memory)
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return False
        mark_used(self._folder)
        return True

    def _fill(
        self,
        model: PreTrainedModel,
        names: dict[str, str],
        sums: dict[str, int],
        device: torch.device,
        progress: Progress,
        memory: MemoryKeys | None,
    ) -> None:
        """``names``: in the file, by the model's names, of which those that share a tensor have one; ``sums``: by those."""
        on_host, made, done = modules_on_host(model, memory) if memory else set(), {}, 0
        _empty(model)  # one that was quantised just now is not to be held beside what is read
        with (self._folder / TENSORS).open("rb") as file:
            tensors = _Tensors(file, device)
            for prefix, module in model.named_modules():
                for name, empty in _own_tensors(module):
                    stored = names[f"{prefix}.{name}" if prefix else name]
                    if stored not in made:
                        made[stored] = tensors.read(stored, empty, sums[stored])
                        done += made[stored].nbytes
                        progress("load the quantised base", done, tensors.nbytes)
                    put(module, name, made[stored])
                if module in on_host:
                    keep_on_host(module, device)

    def write(self, model: PreTrainedModel) -> bool:
        """Keep what ``model``, just loaded, holds, if that leaves as much free on the disk; return whether it is kept.

        A full or read-only disk stops no run.
        """
        names, tensors, first = {}, {}, {}
        for prefix, module in model.named_modules():
            for own, tensor in _own_tensors(module):
                name = f"{prefix}.{own}" if prefix else own
                names[name] = first.setdefault(tensor, name)
                tensors[names[name]] = tensor
        if free_disk(self._folder) < 2 * sum(tensor.nbytes for tensor in tensors.values()):
            return False
        with suppress(MachineError):
            with new_folder(self._folder) as folder:
                write_tensors(folder / TENSORS, tensors)
                write_json(folder / NAMES, {"names": names, "sums": {name: _sum(tensor) for name, tensor in tensors.items()}})
            drop_oldest(self._folder.parent, CACHE_BYTES, keep=self._folder)
            return True
        return False


class _Tensors:
    """The tensors of an open safetensors file: on a CPU they are places of a window on it, elsewhere they are read on their way to a card.

    Pages of a window that are short of memory are dropped and read again, where others are swapped out or end the process, and several
    runs over one base share them. What is written into one is this process's own; the file itself is only ever deleted, which leaves
    windows as they are, and nobody else may write to it. Through the library each tensor is a window of its own, at 2 ms in a file of
    a thousand. The format: huggingface.co/docs/safetensors, "Format".
    """

    def __init__(self, file: BinaryIO, device: torch.device):
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        if length > size - 8:
            raise ValueError(f"a table of {length} bytes in a file of {size}")
        self._file, self._start, self._table, self._device = file, 8 + length, json.loads(file.read(length)), device
        self.nbytes = size - self._start
        self._content = np.memmap(file, np.uint8, "c", self._start) if has_window(device) else None

    def read(self, name: str, empty: Tensor, expected: int) -> Tensor:
        """Return the tensor ``name``, like ``empty`` but for its content, whose ``_sum`` is ``expected``, on the device.

        Raises:
            ValueError, KeyError: the file has another one, or none.
        """
        entry = self._table[name]
        begin, end = entry["data_offsets"]
        if (tuple(entry["shape"]), entry["dtype"], end - begin) != (tuple(empty.shape), DTYPE_NAMES[empty.dtype], empty.nbytes):
            raise ValueError(f"{name} is not what the model needs")
        if end > self.nbytes:
            raise ValueError(f"{name} is cut short")
        if self._content is None:
            make = partial(torch.empty, empty.shape, dtype=empty.dtype)
            tensor = make() if self._device.type == "cpu" else window(make)  # on its way to a card it is no memory of the card's
            self._file.seek(self._start + begin)
            self._file.readinto(tensor.reshape(-1).view(torch.uint8).numpy())
        else:
            tensor = torch.from_numpy(self._content[begin:end]).view(empty.dtype).view(empty.shape)
        if _sum(tensor) != expected:
            raise ValueError(f"{name} is not what was written")
        tensor = tensor.to(self._device)
        return nn.Parameter(tensor, requires_grad=False) if isinstance(empty, nn.Parameter) else tensor


def has_window(device: torch.device) -> bool:
    """Return whether a base that is filled from the cache on ``device`` lies in the file, not in memory of the process's own."""
    # Windows deletes no file that somebody has a window on, and the cache must be able to drop it.
    return device.type == "cpu" and sys.platform != "win32"


def _sum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bytes, eight at a time, in 64 bits: a changed byte or a page that was lost makes another.

    As fast as memory is read: a hash of a base of 1.1 billion weights would take as long as reading it does.
    """
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    even = len(flat) // 8 * 8
    words = flat[:even] if flat.storage_offset() % 8 == 0 else flat[:even].clone()
    return int(words.view(torch.int64).sum()) + int(flat[even:].sum(dtype=torch.int64))


def _empty(model: nn.Module) -> None:
    """Let go of what ``model`` holds, but for its shapes and types."""
    for module in model.modules():
        for name, tensor in _own_tensors(module):
            meta = tensor.to("meta")
            put(module, name, nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of what a file holds of ``module`` without its children."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor
