"""A base model's tensors, read one at a time from a folder of safetensors files under the names transformers gives them."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from qlite.errors import ModelError, shown
from qlite.given import require_regular, require_sound_table
from qlite.model.folder import (
    folder_tokenizer,
    is_inside,
    is_plain,
    one_line,
    read_config,
    read_object,
    refuse_quantised,
    require_plain_files,
)
from qlite.model.source import ModelFiles
from qlite.offload import window

if TYPE_CHECKING:
    from qlite.model.gguf import GgufCheckpoint

INDEX_FILE = "model.safetensors.index.json"


def open_checkpoint(files: ModelFiles) -> "SafetensorsCheckpoint | GgufCheckpoint":
    """Return the reader for ``files``; both kinds have the same public methods.

    Raises:
        ModelError: the files are missing, malformed, already quantised, or of an unknown architecture.
    """
    if files.gguf is None:
        return SafetensorsCheckpoint(files)
    from qlite.model.gguf import GgufCheckpoint  # here: the gguf package is needed for such files only

    return GgufCheckpoint(files)


def read_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    """Return the tokenizer of ``files``, of which the weights need not be there yet.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    return folder_tokenizer(files) if files.gguf is None else open_checkpoint(files).tokenizer()


class SafetensorsCheckpoint:
    """A folder with config.json and safetensors, whole or in shards named by an index. Nothing is held open.

    Making one reads the headers only, and raises ModelError for an index that names what is not there or lies outside the folder,
    for a damaged shard, and for a checkpoint that is already quantised.
    """

    def __init__(self, files: ModelFiles):
        require_plain_files(files.folder)
        self.files = files
        self._raw_config = read_object(files.folder / "config.json")
        refuse_quantised(self._raw_config, files)
        self._shards = _shards(files.folder)
        self._entries = {name: entry for shard, names in self._shards.items() for name, entry in _entries(shard, names).items()}

    def config(self) -> PreTrainedConfig:
        """Return the architecture. Raises ModelError for one that transformers does not know by itself."""
        config = read_config(self.files)
        layers = getattr(config, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > len(self._entries):  # before a module is made for each of a thousand million
            raise ModelError(
                f'base.model: "{self.files.name}": config.json: num_hidden_layers is {layers}, and its files hold {len(self._entries)} '
                "tensors in all; download it again"
            )
        return config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's shape by name, in reading order."""
        return {name: shape for name, (_, shape, _) in self._entries.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype in which ``read`` gives each tensor: the stored one."""
        return {name: dtype for name, (_, _, dtype) in self._entries.items()}

    def order(self) -> list[str]:
        """Return the names shard by shard in file order: reading them so goes through the disk once."""
        return list(self._entries)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors as ``read`` returns them."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in self._entries.values())

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU in its stored dtype: a view of the file, whose pages leave memory with the tensor.

        Writing to it changes memory only, never the file. Raises ModelError if a value of it is not finite.
        """
        shard, _, _ = self._entries[name]
        # One handle per tensor: opening takes 0.1 ms, and a handle that lives on would keep every page read so far.
        with safe_open(shard, "pt") as handle:
            tensor = window(lambda: handle.get_tensor(name))
        require_finite(tensor, f"{shard}: {shown(name)}")
        return tensor

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor with all the digits it has here: as ``read`` gives it, for nothing is rounded there."""
        yield self.read(name)

    def weight_files(self) -> list[Path]:
        """Return the files that the tensors are read from, and the config that says what they are."""
        return [self.files.folder / "config.json", *self._shards]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the folder's tokenizer. Raises ModelError if there is none, or only one that needs its own Python code."""
        return folder_tokenizer(self.files)

    def generation_config(self) -> GenerationConfig | None:
        """Return what generation_config.json says, or None without one."""
        path = self.files.folder / "generation_config.json"
        if not path.is_file():
            return None
        read_object(path)
        try:
            return GenerationConfig.from_pretrained(self.files.folder, local_files_only=True)
        except Exception as error:  # as for config.json
            raise ModelError(f"{path}: cannot be used ({one_line(error)}); mend it or remove it") from error

    def fingerprint(self) -> str:
        """Return a short identity from the config and the shards' tables of tensors, not from values or the path."""
        table = [(name, list(shape), str(dtype), shard.name) for name, (shard, shape, dtype) in self._entries.items()]
        sizes = {shard.name: shard.stat().st_size for shard in self._shards}
        text = json.dumps([self._raw_config, table, sizes], sort_keys=True)
        return "safetensors:" + hashlib.sha256(text.encode()).hexdigest()[:16]


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise ModelError if ``tensor`` holds NaN or infinity; ``what`` names it. One pass over its memory, at that memory's speed."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # isfinite() would make a second tensor, and takes twenty times as long in 16 bit; NaN gets through the least and the largest.
    if not all(bool(value.isfinite()) for value in torch.aminmax(tensor)):
        raise ModelError(f"{what} has values that are not finite (NaN or infinity), so no sum over them is a number; download it again")


# The folder


def _shards(folder: Path) -> dict[Path, list[str] | None]:
    """Return the weight files, each with the tensors to take from it (None: all)."""
    index = folder / INDEX_FILE
    if index.is_file():
        return _indexed_shards(folder, index)
    whole = folder / "model.safetensors"
    found = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ModelError(
            f'base.model: "{folder}": expected model.safetensors or {INDEX_FILE}, found {names}; the download may be incomplete'
        )
    return {_inside(folder, found[0].name, found[0].name): None}


def _indexed_shards(folder: Path, index: Path) -> dict[Path, list[str] | None]:
    weight_map = read_object(index, says_once=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: has no weight_map; download the file again")
    shards: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_plain(name):
            given = shown(json.dumps(name))
            raise ModelError(
                f"{index}: weight_map.{shown(tensor)} = {given} is not a plain file name; qlite reads no file outside the folder"
            )
        shards.setdefault(name, []).append(tensor)
    return {_inside(folder, name, f"{INDEX_FILE}: weight_map.{shown(tensors[0])}"): tensors for name, tensors in sorted(shards.items())}


def _inside(folder: Path, name: str, named_by: str) -> Path:
    """Return the file's path, if it is there and its real place is in the folder or in the same hub repository's blobs."""
    path = folder / name
    if not os.path.exists(path):
        raise ModelError(f"{folder}: {named_by} names {name}, which is missing; the download may be incomplete")
    try:
        require_regular(path)
    except OSError as error:
        where = f"{folder}: {named_by} names {name}"
        raise ModelError(f"{where}, which cannot be read ({error.strerror}); put the file itself there") from error
    if not is_inside(path, folder):
        raise ModelError(f"{folder}: {named_by} names {name}, a link to {path.resolve()} outside the folder; put the file itself there")
    return path


def _entries(shard: Path, wanted: list[str] | None) -> dict[str, tuple[Path, tuple[int, ...], torch.dtype]]:
    """Return file, shape and dtype of each wanted tensor, in file order."""
    with _reading(shard), safe_open(shard, "pt") as handle:
        stored = handle.offset_keys()
        missing = sorted(set(wanted or ()) - set(stored))
        if missing:
            raise ModelError(f"{shard}: lacks {shown(missing[0])}, which {INDEX_FILE} says it holds; download both files again")
        chosen = set(stored if wanted is None else wanted)
        names = [name for name in stored if name in chosen]
        slices = {name: handle.get_slice(name) for name in names}
        return {name: (shard, tuple(part.get_shape()), _dtype(part.get_dtype(), shard, name)) for name, part in slices.items()}


@contextmanager
def _reading(shard: Path) -> Iterator[None]:
    try:
        require_sound_table(shard)
        yield
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"{shard}: is damaged or cut short ({error}); download it again") from error


def _dtype(stored: str, shard: Path, name: str) -> torch.dtype:
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    known |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
    if stored not in known:
        raise ModelError(f"{shard}: {shown(name)} is stored as {stored}; give the 16-bit model that it was quantised from")
    return known[stored]
