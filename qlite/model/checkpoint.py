"""A base model's tensors, read one at a time from a folder of safetensors files under the names transformers gives them."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from qlite.errors import ModelError
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
    return _folder_tokenizer(files) if files.gguf is None else open_checkpoint(files).tokenizer()


class SafetensorsCheckpoint:
    """A folder with config.json and safetensors, whole or in shards named by an index. Nothing is held open.

    Making one reads the headers only, and raises ModelError for an index that names what is not there or lies outside the folder,
    for a damaged shard, and for a checkpoint that is already quantised.
    """

    def __init__(self, files: ModelFiles):
        self.files = files
        self._raw_config = _read_json(files.folder / "config.json")
        _refuse_quantised(self._raw_config, files)
        self._shards = _shards(files.folder)
        self._entries = {name: entry for shard, names in self._shards.items() for name, entry in _entries(shard, names).items()}

    def config(self) -> PreTrainedConfig:
        """Return the architecture. Raises ModelError for one that transformers does not know by itself."""
        model_type = self._raw_config.get("model_type")
        where = f'base.model: "{self.files.name}"'
        if model_type not in CONFIG_MAPPING:
            if "auto_map" in self._raw_config:
                raise ModelError(
                    f'{where} (model_type "{model_type}") needs its own Python code, which qlite never runs; '
                    "choose a model that transformers supports natively"
                )
            raise ModelError(
                f"{where}: config.json: model_type {json.dumps(model_type)} is unknown to this transformers; "
                "upgrade transformers or choose another base"
            )
        try:
            return AutoConfig.from_pretrained(self.files.folder, local_files_only=True)
        except (StrictDataclassError, ValueError, TypeError, KeyError, OSError) as error:
            raise ModelError(f"{where}: config.json cannot be used: {error}") from error

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

        Writing to it changes memory only, never the file.
        """
        shard, _, _ = self._entries[name]
        # One handle per tensor: opening takes 0.1 ms, and a handle that lives on would keep every page read so far.
        with safe_open(shard, "pt") as handle:
            return window(lambda: handle.get_tensor(name))

    def weight_files(self) -> list[Path]:
        """Return the files that the tensors are read from, and the config that says what they are."""
        return [self.files.folder / "config.json", *self._shards]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the folder's tokenizer. Raises ModelError if there is none, or only one that needs its own Python code."""
        return _folder_tokenizer(self.files)

    def generation_config(self) -> GenerationConfig | None:
        """Return what generation_config.json says, or None without one."""
        if not (self.files.folder / "generation_config.json").is_file():
            return None
        return GenerationConfig.from_pretrained(self.files.folder, local_files_only=True)

    def fingerprint(self) -> str:
        """Return a short identity from the config and the shards' tables of tensors, not from values or the path."""
        table = [(name, list(shape), str(dtype), shard.name) for name, (shard, shape, dtype) in self._entries.items()]
        sizes = {shard.name: shard.stat().st_size for shard in self._shards}
        text = json.dumps([self._raw_config, table, sizes], sort_keys=True)
        return "safetensors:" + hashlib.sha256(text.encode()).hexdigest()[:16]


# The folder


def _folder_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    folder = files.folder
    settings = [_read_json(path) if (path := folder / name).is_file() else {} for name in ("config.json", "tokenizer_config.json")]
    has_own_code = any("AutoTokenizer" in (each.get("auto_map") or ()) or isinstance(each.get("auto_map"), list) for each in settings)
    if has_own_code and not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f'base.model: "{files.name}": its tokenizer needs its own Python code, which qlite never runs; '
            "add a tokenizer.json to the folder"
        )
    # tokenizer.json is complete in itself; AutoTokenizer would ask at the terminal whether to run the code.
    loader = PreTrainedTokenizerFast if has_own_code else AutoTokenizer
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise ModelError(
            f'base.model: "{files.name}" has no tokenizer that can be read ({_first_line(error)}); '
            "put tokenizer.json and tokenizer_config.json beside config.json"
        ) from error


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
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: has no weight_map; download the file again")
    shards: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != Path(name).name or "\\" in name or ":" in name or name in ("", ".", ".."):
            raise ModelError(
                f"{index}: weight_map.{tensor} = {json.dumps(name)} is not a plain file name; qlite reads no file outside the folder"
            )
        shards.setdefault(name, []).append(tensor)
    return {_inside(folder, name, f"{INDEX_FILE}: weight_map.{tensors[0]}"): tensors for name, tensors in sorted(shards.items())}


def _inside(folder: Path, name: str, named_by: str) -> Path:
    """Return the file's path, if it is there and its real place is in the folder or in the same hub repository's blobs."""
    path, root = folder / name, folder.resolve()
    if not path.is_file():
        raise ModelError(f"{folder}: {named_by} names {name}, which is missing; the download may be incomplete")
    # The hub's cache: models--org--name/snapshots/<commit>/file -> ../../blobs/<hash>
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(path.resolve().is_relative_to(allowed) for allowed in roots):
        raise ModelError(f"{folder}: {named_by} names {name}, a link to {path.resolve()} outside the folder; put the file itself there")
    return path


def _entries(shard: Path, wanted: list[str] | None) -> dict[str, tuple[Path, tuple[int, ...], torch.dtype]]:
    """Return file, shape and dtype of each wanted tensor, in file order."""
    with _reading(shard), safe_open(shard, "pt") as handle:
        stored = handle.offset_keys()
        missing = sorted(set(wanted or ()) - set(stored))
        if missing:
            raise ModelError(f"{shard}: lacks {missing[0]}, which {INDEX_FILE} says it holds; download both files again")
        chosen = set(stored if wanted is None else wanted)
        names = [name for name in stored if name in chosen]
        slices = {name: handle.get_slice(name) for name in names}
        return {name: (shard, tuple(part.get_shape()), _dtype(part.get_dtype(), shard, name)) for name, part in slices.items()}


@contextmanager
def _reading(shard: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ModelError(f"{shard}: is damaged or cut short ({error}); download it again") from error


def _dtype(stored: str, shard: Path, name: str) -> torch.dtype:
    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    known |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
    if stored not in known:
        raise ModelError(f"{shard}: {name} is stored as {stored}; give the 16-bit model that it was quantised from")
    return known[stored]


def _refuse_quantised(config: dict, files: ModelFiles) -> None:
    settings = config.get("quantization_config")
    if settings is None:
        return
    method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
    raise ModelError(
        f'base.model: "{files.name}" is already quantised (config.json: quant_method "{method}"), which is not supported yet; '
        "name the 16-bit model that it was made from, and qlite quantises it while loading"
    )


def _read_json(path: Path) -> dict:
    """Return a JSON file's object. Raises ModelError if it is missing or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); the model folder is incomplete") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold one JSON object; download it again")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
