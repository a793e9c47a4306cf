"""An adapter that another program wrote in PEFT's format, read without PEFT: low-rank pairs, factors, whole tensors and token rows.

Names of tensors are PEFT's: what stands before the layer's name and an adapter's own name within it ("default", in files that were not
saved by PEFT itself) say nothing. Source: PEFT 0.21, utils/save_and_load.py and utils/other.py.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qlite.errors import AdapterError, shown, some_of
from qlite.formats.foreign_config import ADALORA, IA3, ForeignConfig, read_config
from qlite.formats.peft import CONFIG, LORA_B, PREFIX, SHOWN_NAME, WEIGHTS, full_name, read_tensors
from qlite.methods.adalora import PEFT_EPS
from qlite.methods.low_rank import LowRank

MOST_PROBLEMS = {CONFIG: 20, WEIGHTS: 5}
"""Of each file, in one message."""
# What a compiled, a sharded or a checkpointed model puts into its tensors' names.
WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# PEFT's parts of an adapted layer -> their own names here. A name of the adapter may stand before the last part.
PARTS = [
    (re.compile(r"^(.+)\.(lora_[AB])(?:\.[^.]+)?\.(weight|bias)$"), r"\2.\3"),
    (re.compile(r"^(.+)\.(lora_embedding_[AB])(?:\.[^.]+)?$"), r"\2"),
    (re.compile(r"^(.+)\.(lora_magnitude_vector)(?:\.[^.]+){0,2}$"), r"\2"),
    # AdaLoRA's and (IA)^3's.
    (re.compile(r"^(.+)\.(lora_[ABE]|ia3_l)(?:\.[^.]+)?$"), r"\2"),
    (re.compile(r"^(.+)\.token_adapter\.(trainable_tokens_delta)(?:\.[^.]+)?$"), r"\2"),
]
METHODS_OWN = ("lora_", "ia3_", "trainable_")
"""How the names of parts begin that a method trains; others stand in the place of the base's own."""
TRIPLETS = ("lora_A", "lora_E", "lora_B")
# The base's own tensors, kept beside what was trained: they say nothing new.
COPIES = re.compile(r"\.original_module\.|\.trainable_tokens_original(\.|$)")
WHOLE = re.compile(r"^(.+?)\.(?:modules_to_save(?:\.[^.]+)?\.|(?:token_adapter\.)?base_layer\.)?([^.]+)$")


@dataclass(frozen=True)
class Pair:
    """The update of one layer: scaling * B A, and what goes with it."""

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    """DoRA's lengths."""
    bias: Tensor | None = None
    """lora_bias: scaled as the product is."""

    @property
    def shapes(self) -> str:
        """Those of A, B and, if there are any, the lengths."""
        return ", ".join(str(list(tensor.shape)) for tensor in (self.A, self.B, self.magnitude) if tensor is not None)

    @property
    def fits(self) -> bool:
        """Whether B A can be multiplied, and its rows have the lengths that there are."""
        is_product = self.A.dim() == self.B.dim() == 2 and self.B.shape[1] == len(self.A)
        return is_product and (self.magnitude is None or self.magnitude.shape == self.B.shape[:1])


@dataclass(frozen=True)
class ForeignAdapter:
    """What an adapter's two files hold, by the layers' dotted names in the base model."""

    linears: dict[str, Pair] = field(default_factory=dict)
    embeddings: dict[str, Pair] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    """Linear -> (IA)^3's: [out, 1] of what it gives, or [1, in] of what it is given."""
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Layer -> the tensors ("weight", "bias") that stand in the place of its own."""
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    """Embedding or head -> tokens and their rows."""
    modules_to_save: tuple[str, ...] = ()
    """What the config says of ``whole``: ends of layers' names."""
    base_name: str | None = None
    """The base as the config names it."""

    @property
    def _more(self) -> dict[str, dict]:
        return {
            "factors of linears": self.factors,
            "whole layers": self.whole,
            "token rows": self.rows,
            "an embedding's update": self.embeddings,
        }

    @property
    def is_more_than_updates(self) -> bool:
        """Whether it does more than low-rank updates of linears."""
        return any(self._more.values()) or any(pair.bias is not None for pair in self.linears.values())

    @property
    def zero_part(self) -> str:
        """Which of the tensors are zero where every update is."""
        pairs = [*self.linears.values(), *self.embeddings.values()]
        return "*.lora_A.weight or, of AdaLoRA, *.lora_E" if any(pair.B.any() for pair in pairs) else f"*{LORA_B}"

    def updates(self, origin: Path) -> dict[str, LowRank]:
        """Return what the adapter does to each linear, by the linear's dotted name; ``origin`` is only named in messages.

        Raises:
            AdapterError: it does more than that, its tensors do not fit each other, or they change nothing.
        """
        problems = [f"holds {what} ({', '.join(map(shown, layers))})" for what, layers in self._more.items() if layers]
        problems += [f"holds a bias of {shown(layer, SHOWN_NAME)}" for layer, pair in self.linears.items() if pair.bias is not None]
        if problems:
            raise AdapterError(f"{origin}: {some_of(problems, 5)}; only low-rank updates of linears stand beside each other on one base")
        unfit = [f"{shown(layer, SHOWN_NAME)}: {pair.shapes}" for layer, pair in self.linears.items() if not pair.fits]
        if unfit:
            raise AdapterError(f"{origin}: tensors that do not fit each other: {some_of(unfit, 5)}")
        if not any(pair.magnitude is not None or (pair.A.any() and pair.B.any()) for pair in self.linears.values()):
            raise AdapterError(
                f"{origin}: every {self.zero_part} is zero, so the adapter changes nothing of its base; was it ever trained?"
            )
        return {layer: LowRank(pair.A, pair.B, pair.scaling, pair.magnitude) for layer, pair in self.linears.items()}


def read_foreign_adapter(folder: Path) -> ForeignAdapter:
    """Return the PEFT adapter in ``folder``.

    Raises:
        AdapterError: its type or one of its options is not supported, or its files do not fit each other: all of it in one message.
    """
    config, config_problems = read_config(folder / CONFIG)
    parts, problems = _parts(read_tensors(folder))
    if config.kind == ADALORA:
        problems += _multiply_singular_values(parts, config.rank)
    found = _Found(config, parts, problems)
    found.check_pairs()
    if not config_problems:  # what it says could not be read, so the tensors cannot be held against it
        found.check_against_config()
    both = {CONFIG: config_problems, WEIGHTS: found.problems}
    told = [f"{folder / name}: {some_of(each, MOST_PROBLEMS[name])}" for name, each in both.items() if each]
    if told:
        raise AdapterError(". ".join(told))
    return found.adapter()


Parts = dict[str, dict[str, Tensor]]
"""Layer -> the parts of it that the file holds, by their own names."""


def _parts(tensors: dict[str, Tensor]) -> tuple[Parts, list[str]]:
    """Return what the file holds by layer and part, and what is wrong with its names."""
    parts: Parts = {}
    problems = []
    for name, tensor in tensors.items():
        plain = WRAPPERS.sub("", name)
        if COPIES.search(plain):
            continue
        layer, part = _split(plain.removeprefix(PREFIX))
        if not plain.startswith(PREFIX) or not layer:
            problems.append(f"has {shown(name, SHOWN_NAME)}, which nothing here takes: PEFT's names are {PREFIX}<layer>.<tensor>")
        elif part in parts.setdefault(layer, {}):
            problems.append(f"holds {shown(layer, SHOWN_NAME)}.{part} twice, as two adapters in one file do; save them one by one")
        else:
            parts[layer][part] = tensor
        if not tensor.isfinite().all():
            problems.append(f"{shown(name, SHOWN_NAME)} has values that are not finite")
    return parts, problems


def _split(name: str) -> tuple[str, str]:
    """Return (layer, part) of a tensor's name; the layer is empty where the name has none."""
    for pattern, part in PARTS:
        if match := pattern.match(name):
            return match[1], match.expand(part)
    match = WHOLE.match(name)
    return (match[1], match[2]) if match else ("", name)


def _multiply_singular_values(parts: Parts, first_rank: int) -> list[str]:
    """Make LoRA's pairs of AdaLoRA's triplets, B (E * A), where they lie in ``parts``; return what is wrong with them.

    However many triplets of a layer are left, they are scaled by the rank that all began with. A layer of which none is left has no pair.
    """
    problems = []
    for layer, part in parts.items():
        strange = [name for name in part if name.startswith("lora_") and name not in TRIPLETS]
        problems += [f"has {full_name(layer, name)}, which nothing here takes in an adapter of its type" for name in strange]
        A, E, B = (part.get(name) for name in TRIPLETS)
        if A is None or E is None or B is None:
            problems += [f"lacks {full_name(layer, name)}" for name in TRIPLETS if name not in part and part.keys() & set(TRIPLETS)]
        elif not (A.dim() == B.dim() == 2 and E.shape == (len(A), 1)):
            shapes = ", ".join(str(list(each.shape)) for each in (A, E, B))
            problems.append(f"{shown(layer, SHOWN_NAME)}: {shapes} are no lora_A [R, in], lora_E [R, 1] and lora_B [out, R]")
        elif len(A):
            rank, wide = len(A), torch.promote_types(torch.promote_types(A.dtype, E.dtype), torch.float32)
            part |= {"lora_A.weight": A.to(wide) * E.to(wide) * (rank / (first_rank + PEFT_EPS)), "lora_B.weight": B}
        for name in TRIPLETS:
            part.pop(name, None)
    return problems


class _Found:
    """An adapter's parts on their way to a ``ForeignAdapter``, with what is wrong with them."""

    def __init__(self, config: ForeignConfig, parts: Parts, problems: list[str]):
        self.config, self.parts, self.problems = config, parts, problems

    def check_pairs(self) -> None:
        """Note what lacks its other half, or cannot be multiplied."""
        if not self._holds({"ia3_l"} if self.config.kind == IA3 else {"lora_A.weight", "lora_embedding_A"}):
            lacking = {IA3: ("ia3_l", "an (IA)^3"), ADALORA: ("lora_A", "an AdaLoRA")}.get(self.config.kind, ("lora_A.weight", "a LoRA"))
            self.problems.append(f"holds no tensor called *.{lacking[0]}; is it {lacking[1]} adapter?")
        for layer, part in self.parts.items():
            # One of another type's would be lost silently.
            of_another = [name for name in part if (name == "ia3_l") != (self.config.kind == IA3) and name.startswith(("lora_", "ia3_"))]
            others = of_another or [name for name in TRIPLETS if name in part]
            self.problems += [f"has {full_name(layer, name)}, which nothing here takes in an adapter of its type" for name in others]
            for A, B in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
                if A in part and B not in part:
                    self.problems.append(f"lacks {full_name(layer, B)}")
                if B in part and A not in part:
                    self.problems.append(f"has {full_name(layer, B)}, which nothing here takes without its {A}")
            is_pair = {"lora_A.weight", "lora_embedding_A"} & part.keys()
            for alone in ("lora_magnitude_vector", "lora_B.bias"):
                if alone in part and not is_pair:
                    self.problems.append(f"has {full_name(layer, alone)}, which nothing here takes without its lora_A")

    def _holds(self, parts: set[str]) -> bool:
        return any(parts & part.keys() for part in self.parts.values())

    def check_against_config(self) -> None:
        """Note where tensors and config say different things."""
        said = {self.config.rank, *self.config.ranks.values()}
        for layer, part in self.parts.items():
            A = part.get("lora_A.weight", part.get("lora_embedding_A"))
            rank = None if A is None else A.shape[0] if A.dim() == 2 else 0
            if rank is not None and (rank not in said or rank == 0):
                told = f"{shown(layer, SHOWN_NAME)} has rank {rank}, and {CONFIG} says r = {self.config.rank} and no such rank_pattern"
                self.problems.append(f"{told}; the two files are not of one adapter")
            if A is not None:
                self._check_option(layer, "lora_magnitude_vector", "use_dora", self.config.dora)
            if "lora_A.weight" in part:
                self._check_option(layer, "lora_B.bias", "lora_bias", self.config.lora_bias)
            self._check_rows(layer, part.get("trainable_tokens_delta"))
        if self.config.token_ids and not any("trainable_tokens_delta" in part for part in self.parts.values()):
            self.problems.append(f"lacks *.trainable_tokens_delta, the rows of the tokens that {CONFIG} has in trainable_token_indices")

    def _check_option(self, layer: str, part: str, key: str, is_said: bool) -> None:
        if (part in self.parts[layer]) != is_said:
            what = f"lacks {full_name(layer, part)}" if is_said else f"has {full_name(layer, part)}, which nothing here takes"
            self.problems.append(f"{what}: {CONFIG} says {key} = {str(is_said).lower()}")

    def _check_rows(self, layer: str, rows: Tensor | None) -> None:
        if rows is None:
            return
        ids = self.config.ids_of(layer)
        count = 0 if ids is None else len(ids)
        if rows.dim() != 2 or len(rows) != count or not count:
            name, shape = full_name(layer, "token_adapter.trainable_tokens_delta"), list(rows.shape)
            self.problems.append(f"{name} is {shape}, and {CONFIG} has {count} tokens for it in trainable_token_indices")

    def adapter(self) -> ForeignAdapter:
        """Return what was found, when nothing is wrong with it."""
        linears = self._pairs("lora_A.weight", "lora_B.weight")
        embeddings = self._pairs("lora_embedding_A", "lora_embedding_B")
        rows = {
            layer: (self.config.ids_of(layer), part["trainable_tokens_delta"])
            for layer, part in self.parts.items()
            if "trainable_tokens_delta" in part
        }
        whole = {layer: _whole(part) for layer, part in self.parts.items() if _whole(part)}
        factors = {layer: part["ia3_l"] for layer, part in self.parts.items() if "ia3_l" in part}
        return ForeignAdapter(linears, embeddings, factors, whole, rows, self.config.modules_to_save, self.config.base_name)

    def _pairs(self, A: str, B: str) -> dict[str, Pair]:
        return {layer: self._pair(layer, A, B) for layer, part in self.parts.items() if A in part}

    def _pair(self, layer: str, A: str, B: str) -> Pair:
        part, rank = self.parts[layer], len(self.parts[layer][A])
        scaling = self.config.alpha_of(layer) / (rank**0.5 if self.config.rslora else rank)
        if self.config.kind == ADALORA:  # triplets that were masked are in its file, and in no rank
            left = part[A].any(dim=1)
            left[0] |= not left.any()
            return Pair(part[A][left], part[B][:, left], scaling)
        return Pair(part[A], part[B], scaling, part.get("lora_magnitude_vector"), part.get("lora_B.bias"))


def _whole(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those of a layer's parts that stand in the place of the base's own tensors."""
    return {name: tensor for name, tensor in part.items() if not name.startswith(METHODS_OWN)}
