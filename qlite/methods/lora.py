"""LoRA: low-rank adaptation, y = W x + (alpha / r) B A x.   Hu et al. 2021, arXiv:2106.09685, section 4.1.

Parameter names follow PEFT's files (``lora_A.weight``, ``lora_B.weight``, ``lora_magnitude_vector``), so an adapter is
readable by PEFT as it is.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlite.errors import RecipeError
from qlite.methods.base import PEFT_PREFIX, Method, Original, Targets, adapt_linears, matches, saved_tensors, select_linears
from qlite.methods.lora_init import BegunLinear, LoftqLinear, LoftqRoundsLinear, PissaLinear, begun_linears
from qlite.methods.lora_linear import DoRALinear, LoRALinear, join_siblings
from qlite.methods.low_rank import peft_updates, require_pair
from qlite.methods.token_rows import head_tied_to, rows_to_train, token_ids, train_rows
from qlite.methods.whole import select_whole, train_whole
from qlite.quant.linear import QuantLinear


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank matrices beside the chosen linears of the frozen base."""

    name: ClassVar[str] = "lora"
    needs_plain_linears: ClassVar[bool] = True
    rank: Annotated[int, Field(ge=1)] = 16
    """Rank r of the update B A."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's input that is dropped in training."""
    targets: Targets = "all-linear"
    """"all-linear", "attention", or a list of layer names or patterns: ["q_proj", "model.layers.1?.mlp.*"]."""
    rank_per_target: dict[str, Annotated[int, Field(ge=1)]] = field(default_factory=dict)
    """Another rank for layers matching a name or pattern: {"q_proj" = 32}; the first match counts."""
    alpha_per_target: dict[str, Annotated[float, Field(gt=0)]] = field(default_factory=dict)
    """Another alpha for layers matching a name or pattern: {"q_proj" = 64}; the first match counts."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732, section 3)."""
    dora: bool = False
    """Train each row's length apart from its direction (DoRA, arXiv:2402.09353, section 4.1)."""
    b_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """B's learning rate over A's, which is optimizer.lr (LoRA+, arXiv:2402.12354, section 4; there 16)."""
    init: Literal["zero", "pissa", "loftq"] = "zero"
    """What A and B begin as. "zero": B is 0. "pissa": the weight's largest singular directions, over the quantised rest (arXiv:2404.02948,
    section 3). "loftq": those of what quantising takes away (arXiv:2310.08659, algorithm 1)."""
    loftq_rounds: Annotated[int, Field(ge=1)] = 1
    """With init = "loftq": how often quantising and factors take turns. More than 1 changes the frozen base."""
    modules_to_save: tuple[str, ...] = ()
    """Layers that are trained whole, each a dense copy in the place of the frozen one: names or patterns, ["lm_head", "embed_tokens"].
    Where the model has one tensor for embedding and head, each that is named gets its own."""
    trained_tokens: tuple[str | Annotated[int, Field(ge=0)], ...] = ()
    """Tokens of the tokenizer, or their ids, whose own rows of embedding and head are trained, all other rows staying as they are:
    ["<|reserved_special_token_0|>"]."""
    new_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that become tokens, ["<tool>"]: each gets a row of the embedding that no token has yet, which is trained as those of
    trained_tokens are."""

    def resolved(self, tokenizer: PreTrainedTokenizerBase | None) -> "LoRA":
        if not (self.trained_tokens or self.new_tokens):
            return self
        return replace(self, trained_tokens=token_ids(tokenizer, self.trained_tokens, self.new_tokens), new_tokens=())

    def attach(self, model: nn.Module) -> None:
        chosen = select_linears(model, self.targets)
        tables = {"rank_per_target": self.rank_per_target, "alpha_per_target": self.alpha_per_target}
        unused = [(key, p) for key, table in tables.items() for p in table if not any(matches(name, p) for name in chosen)]
        if unused:
            raise RecipeError([f'method.{key}: "{p}" matches none of the {len(chosen)} target layers; remove it' for key, p in unused])
        whole = select_whole(model, self.modules_to_save, set(chosen))
        self._require_fitting_init(model, chosen)
        assert not any(isinstance(token, str) for token in (*self.trained_tokens, *self.new_tokens)), "resolved() was not called"
        rows = rows_to_train(model, self.trained_tokens, {*chosen, *whole}) if self.trained_tokens else {}
        adapt_linears(model, self.targets, self._adapt)
        join_siblings(model)
        train_whole(model, whole)
        train_rows(model, rows)

    def options_of(self, name: str, tensor: nn.Parameter) -> dict[str, object]:
        return {"lr_ratio": self.b_lr_ratio} if self.b_lr_ratio != 1 and name.endswith(".lora_B.weight") else {}

    def _adapt(self, name: str, base: nn.Module) -> LoRALinear:
        rank = self.rank_of(name)
        require_pair(name, base, rank, way="set it apart in method.rank_per_target, or leave it out of method.targets")
        return self._kind(base, rank, self.scaling_of(name, rank), self.dropout)

    @property
    def _kind(self) -> type[LoRALinear]:
        loftq_kind = LoftqLinear if self.loftq_rounds == 1 else LoftqRoundsLinear
        return {"zero": DoRALinear if self.dora else LoRALinear, "pissa": PissaLinear, "loftq": loftq_kind}[self.init]

    def _require_fitting_init(self, model: nn.Module, chosen: list[str]) -> None:
        """Raise RecipeError if ``init`` is not to be had with the other keys, or for one of the ``chosen`` linears of ``model``."""
        problems, key = [], f'method.init = "{self.init}"'
        if self.loftq_rounds > 1 and self.init != "loftq":
            problems.append(f'method.loftq_rounds = {self.loftq_rounds}: counts with method.init = "loftq" alone; remove one of the two')
        if self.init != "zero" and self.dora:
            problems.append(f"{key}: DoRA's lengths of rows are those of the base, and this changes it; set method.dora = false")
        tied = head_tied_to(model)
        if tied in chosen and issubclass(self._kind, BegunLinear) and self._kind is not LoftqLinear:
            problems.append(f"{key}: {tied} is the embedding's own tensor, and it would change that, too; leave it out of method.targets")
        plain = [name for name in chosen if not isinstance(model.get_submodule(name), QuantLinear)]
        if self.init == "loftq" and plain:
            which = "base.bits = 16" if len(plain) == len(chosen) else f"{plain[0]} is held in 16 bit"
            problems.append(f'{key}: {which}, where nothing is quantised and there is no error to begin with; set it to "pissa" or "zero"')
        if problems:
            raise RecipeError(problems)

    def start(self, model: nn.Module, original: Original) -> None:
        for name, layer in begun_linears(model):
            layer.begin(original(name), self.loftq_rounds)

    def settle(self, model: nn.Module, original: Original) -> None:
        for name, layer in begun_linears(model):
            if layer.moved is not None:
                layer.settle(original(name))

    def peft(self, model: nn.Module) -> tuple[dict, dict[str, Tensor]] | None:
        """Return PiSSA's and LoftQ's adapter as a LoRA of twice the rank over the original weights; None: it is one as it is."""
        begun = dict(begun_linears(model))
        if not begun:
            return None
        fields, tensors = peft_updates({name: layer.update() for name, layer in begun.items()})
        others = {name: tensor for name, tensor in saved_tensors(model).items() if not name.startswith(tuple(f"{each}." for each in begun))}
        return {**fields, "use_rslora": False}, {**tensors, **{PEFT_PREFIX + name: tensor for name, tensor in others.items()}}

    def scaling_of(self, name: str, rank: int) -> float:
        """Return what B A is multiplied by in the linear with dotted name ``name`` and ``rank``."""
        return self.alpha_of(name) / (math.sqrt(rank) if self.rslora else rank)

    def rank_of(self, name: str) -> int:
        """Return the rank of the linear with dotted name ``name``."""
        return next((rank for pattern, rank in self.rank_per_target.items() if matches(name, pattern)), self.rank)

    def alpha_of(self, name: str) -> float:
        """Return the alpha of the linear with dotted name ``name``."""
        return next((alpha for pattern, alpha in self.alpha_per_target.items() if matches(name, pattern)), self.alpha)
