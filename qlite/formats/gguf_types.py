"""The types that a GGUF file can be written in from Python, and which of a model's tensors is stored as what."""

from dataclasses import dataclass
from importlib.metadata import version

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Kind

from qlite.errors import RecipeError, shown


@dataclass(frozen=True)
class GgufType:
    """A type as the user names it: how matrices are stored, and what the file says of itself."""

    name: str
    kind: Kind
    file_type: LlamaFileType

    @property
    def bits(self) -> float:
        """Of one value of a matrix, its block's scale counted with it."""
        values, size = GGML_QUANT_SIZES[self.kind]
        return 8 * size / values

    def kind_of(self, name: str, shape: tuple[int, ...]) -> Kind:
        """Return how the tensor called ``name`` (llama.cpp's) is stored.

        Vectors stay float32, as llama.cpp's arithmetic wants them. Of a file in 4 or 5 bits, embedding and head get 8, because the
        logits are made of them (llama.cpp's quantiser gives them 6, which the gguf package cannot make). Rows that fill no block
        are float16.
        """
        if len(shape) == 1:
            return Kind.F32
        kind = Kind.Q8_0 if self.bits < 8 and name in ("token_embd.weight", "output.weight") else self.kind
        return Kind.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


TYPES = {
    each.name: each
    for each in (
        GgufType("f32", Kind.F32, LlamaFileType.ALL_F32),
        GgufType("f16", Kind.F16, LlamaFileType.MOSTLY_F16),
        GgufType("bf16", Kind.BF16, LlamaFileType.MOSTLY_BF16),
        GgufType("q8_0", Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
        GgufType("q5_1", Kind.Q5_1, LlamaFileType.MOSTLY_Q5_1),
        GgufType("q5_0", Kind.Q5_0, LlamaFileType.MOSTLY_Q5_0),
        GgufType("q4_1", Kind.Q4_1, LlamaFileType.MOSTLY_Q4_1),
        GgufType("q4_0", Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    )
}
"""Not the package's ternary types and MXFP4, which are for models that were trained in them."""


def gguf_type(name: str) -> GgufType:
    """Return the type called ``name``, in either case. Raises RecipeError, naming those there are."""
    name = str(name)  # Python's caller may give anything
    found = TYPES.get(name.lower())
    if found is None:
        raise RecipeError(
            f"--gguf {shown(name)}: gguf {version('gguf')} cannot quantise to it in Python; it can to {', '.join(TYPES)}. For another type "
            f"(k-quants such as Q4_K_M) write f16 and give that to llama.cpp's llama-quantize"
        )
    return found
