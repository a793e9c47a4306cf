"""A base model's tensors out of one GGUF file, dequantised one at a time to bfloat16 under the names transformers gives them."""

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlite.errors import ModelError
from qlite.model.checkpoint import require_finite
from qlite.model.gguf_architecture import (
    ROPE_TENSORS,
    GgufModel,
    architecture_of,
    build_config,
    rotary_rows,
    transformers_name,
)
from qlite.model.gguf_header import StoredTensor, read_header
from qlite.model.source import ModelFiles

# Dequantised at once. Small enough for a core's own cache and for torch not to wake its threads (it does so from 32,768 values
# on), which on busy cores took 8 times longer; and a vocabulary's whole table never exists in float32.
CHUNK_VALUES = 2**14
# Given at once where each piece is multiplied: 16 MiB of float32.
PART_VALUES = 2**22

# tokenizer.ggml.pre of byte-level vocabularies whose split transformers 5.23 rebuilds rightly. For any other it silently takes GPT-2's.
KNOWN_SPLITS = {
    *("default", "gpt-2", "smollm"),  # GPT-2's; smollm also parts digits, which its merges never join
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe", "dbrx", "midm-2.0", "lfm2"),
    *("qwen2", "deepseek-r1-qwen", "tekken", "gpt-4o", "llama4", "kanana2"),
}


class GgufCheckpoint:
    """One GGUF file with the methods of ``SafetensorsCheckpoint``. Nothing is held open; making one reads the header.

    Raises ModelError for a file that is damaged, of an architecture that is not read, or with an unknown tensor.
    """

    def __init__(self, files: ModelFiles):
        self.files = files
        self._path = files.folder / files.gguf
        header = read_header(self._path)
        rope = {name: self._rope_factors(stored) for name, stored in header.tensors.items() if name in ROPE_TENSORS}
        self.model = GgufModel(self._path, header, rope)
        self._architecture = architecture_of(self.model)
        weights = [stored for name, stored in header.tensors.items() if name not in ROPE_TENSORS]
        self._stored = {transformers_name(self.model, stored.name): stored for stored in weights}
        self._refuse_unknown_kinds()

    def config(self) -> PreTrainedConfig:
        """Return the architecture that the metadata describes; without an output matrix the embeddings are tied."""
        return build_config(self.model)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's shape by name, in reading order."""
        return {name: stored.shape for name, stored in self._stored.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype in which ``read`` gives each tensor: bfloat16."""
        return dict.fromkeys(self._stored, torch.bfloat16)

    def order(self) -> list[str]:
        """Return the names in file order: reading them so goes through the disk once."""
        return list(self._stored)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors as ``read`` returns them."""
        return sum(torch.Size(stored.shape).numel() * torch.bfloat16.itemsize for stored in self._stored.values())

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU in bfloat16, dequantised in float32 and rounded once. It owns its memory."""
        stored = self._stored[name]
        offset = self._architecture.norm_offset if name.endswith("norm.weight") else 0.0
        places = rotary_rows(self.model, stored.name)
        result = torch.empty(stored.shape, dtype=torch.bfloat16)
        # numpy (which has no bfloat16, hence the bits) scatters rows on this core alone; see CHUNK_VALUES.
        rows = result.view(stored.rows, -1).view(torch.int16).numpy()
        for start, values in self._chunks(stored):
            span = slice(start, start + len(values))
            # float32: a norm is stored as 1 + weight, and bfloat16 near 1 has lost the weight's digits.
            rounded = (values - offset).to(torch.bfloat16)
            rows[span if places is None else places[span]] = rounded.view(torch.int16).numpy()
        require_finite(result, f"{self._path}: {stored.name}")
        return result

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor with all the digits it has here, on the CPU in float32, some rows at a time: what ``read`` rounds.

        Rows that llama.cpp keeps in another order come all at once.
        """
        stored = self._stored[name]
        offset = self._architecture.norm_offset if name.endswith("norm.weight") else 0.0
        places = rotary_rows(self.model, stored.name)
        parts = (values.view(-1, *stored.shape[1:]) - offset for _, values in self._chunks(stored, PART_VALUES))
        if places is None:
            yield from parts
            return
        whole = torch.empty(stored.shape)
        whole[torch.from_numpy(places)] = torch.cat(list(parts))
        yield whole

    def weight_files(self) -> list[Path]:
        """Return the file that the tensors are read from."""
        return [self._path]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer in the metadata, with its chat template and special tokens.

        Raises:
            ModelError: there is none, or its way of splitting text is not known.
        """
        metadata = self.model.header.metadata
        split = metadata.get("tokenizer.ggml.pre", "default")
        if metadata.get("tokenizer.ggml.model") == "gpt2" and split not in KNOWN_SPLITS:
            raise self.model.error(f'its tokenizer splits text as "{split}" does, which is unknown')
        try:
            # Not from_pretrained: that would also read another model's tokenizer files lying in the same folder.
            tokenizer = PreTrainedTokenizerFast(gguf_file=self.files.gguf, name_or_path=str(self.files.folder))
        except Exception as error:  # the tokenizers library raises bare Exception for a malformed vocabulary
            raise self.model.error(f"has no tokenizer that can be read ({error!r})") from error
        tokenizer.name_or_path = self.files.name
        return tokenizer

    def generation_config(self) -> GenerationConfig | None:
        """Return the special tokens with which generation starts, pads and stops (at the end of text or of a turn)."""
        ids = {key: self.model.header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "padding")}
        ends = list(dict.fromkeys(ids[key] for key in ("eos", "eot") if ids[key] is not None))
        return GenerationConfig(bos_token_id=ids["bos"], eos_token_id=ends if len(ends) != 1 else ends[0], pad_token_id=ids["padding"])

    def fingerprint(self) -> str:
        """Return a short identity from the header and the file's size, not from values or the path."""
        with self._path.open("rb") as stream:
            digest = hashlib.sha256(stream.read(self.model.header.data_start))
        digest.update(str(self._path.stat().st_size).encode())
        return "gguf:" + digest.hexdigest()[:16]

    def _chunks(self, stored: StoredTensor, at_once: int = CHUNK_VALUES) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, float32 values [rows, width]) of a tensor, about ``at_once`` of them at a time."""
        row_bytes = stored.nbytes // stored.rows
        # Mapped for this tensor alone and copy-on-write: dropping it gives the pages back, and torch may view it.
        content = np.memmap(self._path, np.uint8, "c", stored.offset, (stored.rows, row_bytes))
        step = max(1, at_once * stored.rows // max(1, torch.Size(stored.shape).numel()))
        for start in range(0, stored.rows, step):
            chunk = np.asarray(content[start : start + step])
            # As one long row: the package works through 16 rows at a time.
            values = gguf.dequantize(chunk.reshape(1, -1), stored.kind)
            yield start, torch.from_numpy(values.reshape(len(chunk), -1))

    def _rope_factors(self, stored: StoredTensor) -> list[float]:
        return [value for _, values in self._chunks(stored) for value in values.flatten().tolist()]

    def _refuse_unknown_kinds(self) -> None:
        """Raise ModelError for a kind of quantisation that the gguf package cannot undo."""
        for kind in {stored.kind for stored in self._stored.values()}:
            block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
            try:
                gguf.dequantize(block, kind)
            except NotImplementedError:
                raise ModelError(
                    f"{self._path}: holds tensors of kind {kind.name}, which gguf {version('gguf')} cannot dequantise; "
                    "take another quantisation of the model"
                ) from None
