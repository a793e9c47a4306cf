"""A merged model as one GGUF file: what llama.cpp, Ollama and LM Studio run.

Each weight is dequantised, merged in float32, put into llama.cpp's order, and quantised slice by slice into the file: no more than one
is in memory. A base that was a GGUF file gives back its own metadata and tokenizer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType
from torch import Tensor

from qlite.formats.gguf_file import GgufTensor, Value, padded, round_trip, write_gguf
from qlite.formats.gguf_model import Written, written_model
from qlite.formats.gguf_tokenizer import tokenizer_fields
from qlite.formats.gguf_types import GgufType
from qlite.formats.merged import Dense, merged_tensors
from qlite.model.gguf_architecture import GgufModel
from qlite.model.gguf_header import raw_values
from qlite.model.load import LoadedBase
from qlite.model.originals import Originals
from qlite.model.wheel import Progress
from qlite.room import require_space
from qlite.units import format_bytes

# Of a base's own GGUF file, beside the architecture's keys and the tokenizer.
KEPT = ("general.license", "general.license.name", "general.license.link", "general.languages")


@dataclass(frozen=True)
class Saying:
    """What the run says beside its weights."""

    name: str
    """The model's, for people."""
    template: str | None
    """The chat template, Jinja."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer."""


def write_merged_gguf(
    path: Path, base: LoadedBase, saying: Saying, as_type: GgufType, progress: Progress, originals: Originals | None = None
) -> int:
    """Write ``base``'s model with its adapter merged as the GGUF file ``path``, in a folder that is being made; return its bytes.

    ``originals``: merge over these weights, not over what the base's storage has made of them.

    Raises:
        NotMergeable: the adapter is more than changed weights.
        ExportError: llama.cpp has no such model or tokenizer; or values do not fit, or are not finite.
        MachineError: the disk does not take it.
    """
    source, dense = gguf_source(base), list(merged_tensors(base.model, originals))
    written = _written(base, dense)
    tensors = [_extra(name, values) for name, values in written.extra.items()] + [_stored(written, each, as_type) for each in dense]
    metadata = _metadata(base, written, saying, as_type, source)
    total = sum(padded(tensor.nbytes) for tensor in tensors)
    require_space(path, total, f"{format_bytes(total)} of {as_type.name} weights")
    write_gguf(path, metadata, tensors, lambda done: progress("merge", done, total))
    return total


class StoredAs:
    """What a GGUF file of one type makes of the merged tensors of ``base``'s model."""

    def __init__(self, base: LoadedBase, as_type: GgufType):
        """Raises ExportError where llama.cpp has no such model."""
        self._names, self._type = _written(base, list(merged_tensors(base.model))).names, as_type

    def __call__(self, dense: Dense) -> Iterator[Tensor]:
        """Yield the values of a matrix as they will be read out of the file, some rows at a time."""
        name = self._names.get(dense.name, "output.weight")  # of a head that is the embedding's tensor
        return (part for rows in dense.parts() for part in round_trip(rows, name, self._type.kind_of(name, dense.shape)))


def _written(base: LoadedBase, dense: list[Dense]) -> Written:
    return written_model(base.model.config, {tensor.name: tensor.shape for tensor in dense}, gguf_source(base))


def require_gguf_tokenizer(base: LoadedBase) -> None:
    """Raise ExportError where llama.cpp has no such tokenizer as ``base``'s; that of a GGUF file stays what it is."""
    if gguf_source(base) is None:
        tokenizer_fields(base.tokenizer, base.model.get_input_embeddings().num_embeddings)


def gguf_source(base: LoadedBase) -> GgufModel | None:
    """Return the GGUF file that ``base`` was read from, as its header describes it, or None where it was no GGUF file."""
    return base.checkpoint.model if base.checkpoint.files.gguf else None


def written_base(base: LoadedBase) -> Written:
    """Return how ``base``'s model is written without its adapter."""
    with torch.device("meta"):
        plain = type(base.model)(base.model.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    if base.model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return written_model(base.model.config, shapes, gguf_source(base))


def general_fields(name: str, kind: str, base: LoadedBase, architecture: str) -> dict[str, Value]:
    """Return what every GGUF file says of itself: its kind ("model" or "adapter"), name and base."""
    source = gguf_source(base)
    named = source and source.header.metadata.get("general.name")
    fields: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": kind,
        "general.name": name,
        "general.base_model.count": 1,
        "general.base_model.0.name": str(named or base.name.rstrip("/").rpartition("/")[2]),
    }
    is_on_hub = source is None and base.name.count("/") == 1 and not Path(base.name).exists()
    return fields | ({"general.base_model.0.repo_url": f"https://huggingface.co/{base.name}"} if is_on_hub else {})


def _stored(written: Written, dense: Dense, as_type: GgufType) -> GgufTensor:
    name = written.names[dense.name]
    return GgufTensor(name, dense.shape, as_type.kind_of(name, dense.shape), lambda: written.stored(dense.name, dense.whole()))


def _extra(name: str, values: Tensor) -> GgufTensor:
    return GgufTensor(name, tuple(values.shape), GGMLQuantizationType.F32, lambda: values)


def _metadata(base: LoadedBase, written: Written, saying: Saying, as_type: GgufType, source: GgufModel | None) -> dict[str, Value]:
    fields = general_fields(saying.name, "model", base, written.architecture)
    fields |= {"general.file_type": int(as_type.file_type), "general.quantization_version": GGML_QUANT_VERSION}
    if source is None:
        fields |= written.metadata
        fields |= tokenizer_fields(base.tokenizer, base.model.get_input_embeddings().num_embeddings)
        known = {key: value for key, value in fields.items() if key.endswith("_token_id")}
    else:
        prefixes = (f"{written.architecture}.", "tokenizer.")
        fields |= {key: raw for key, raw in raw_values(source.path, source.header).items() if key.startswith(prefixes) or key in KEPT}
        known = source.header.metadata
    ends = {known.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    if others := [token for token in saying.stop_ids if token not in ends]:
        # The end of a turn, at which the run has learned to stop.
        fields["tokenizer.ggml.eot_token_id"] = others[0]
    if saying.template:
        fields["tokenizer.chat_template"] = saying.template
    return fields
