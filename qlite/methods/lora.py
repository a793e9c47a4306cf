"""LoRA: low-rank adaptation, y = W x + (alpha / r) B A x.   Hu et al. 2021, arXiv:2106.09685, section 4.1.

Parameter names follow PEFT's files (``lora_A.weight``, ``lora_B.weight``, ``lora_magnitude_vector``), so an adapter is
readable by PEFT as it is.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlite.errors import RecipeError
from qlite.methods.base import AdaptedLinear, Method, Targets, adapt_linears, matches, select_linears
from qlite.methods.lora_product import Adapted, lora_products
from qlite.methods.token_rows import rows_to_train, token_ids, train_rows
from qlite.methods.whole import select_whole, train_whole
from qlite.quant.linear import compute_dtype, dense_weight, is_linear

# Children of one module that are given the same input, by the names that transformers' families give them.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class LoRALinear(AdaptedLinear):
    """A frozen linear plus scaling * B A, with A [R, in] and B [out, R] in the dtype that the base computes in.

    B starts at zero, so the adapted model starts as the base model.
    """

    def __init__(self, base: nn.Module, rank: int, scaling: float, dropout: float):
        super().__init__(base)
        self.rank, self.scaling = rank, scaling
        self.siblings: Siblings | None = None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        where, dtype = base.weight.device, compute_dtype(base)
        self.lora_A, self.lora_B = _factor(base.in_features, rank, dtype, where), _factor(rank, base.out_features, dtype, where)
        if where.type != "meta":
            # Drawn in float32 on the CPU: the same seed gives the same adapter on every device.
            start = torch.empty(rank, base.in_features)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5))
            self.lora_A.weight.data.copy_(start)
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out], in x's dtype."""
        return self.siblings(self, x) if self.siblings else lora_products(x, [self.adapted()], self.dropped_share)[0]

    def adapted(self) -> Adapted:
        """Return what a joint product needs of this module, as it is now."""
        return Adapted(self.base, self.lora_A.weight, self.lora_B.weight, self.scaling)

    @property
    def dropped_share(self) -> float:
        """The share of A's input that is dropped now: none outside of training."""
        return self.dropout.p if self.training and isinstance(self.dropout, nn.Dropout) else 0.0

    def merged_weight(self, dense: Tensor) -> Tensor:
        # float32: the product of two bfloat16 factors needs more digits than either.
        return torch.addmm(dense, self.lora_B.weight.float(), self.lora_A.weight.float(), alpha=self.scaling)


def _factor(in_features: int, out_features: int, dtype: torch.dtype, where: torch.device) -> nn.Linear:
    """Return a linear on ``where``, made on the CPU: a module draws numbers where it is made, and all are to be the same everywhere."""
    linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device=where if where.type == "meta" else "cpu")
    linear.weight = nn.Parameter(linear.weight.detach().to(where))
    return linear


class Siblings:
    """Linears of one parent that are given the same x, one after the other: the first to be called computes all of them."""

    def __init__(self, linears: list[LoRALinear]):
        self.linears = linears
        self._x: Tensor | None = None
        self._are_served = False
        self._waiting: dict[LoRALinear, Tensor] = {}
        for linear in linears:
            linear.siblings = self

    def __call__(self, linear: LoRALinear, x: Tensor) -> Tensor:
        """Return what ``linear``, one of them, makes of x."""
        if self._are_served:  # once in a pass of their parent; what is asked for then (the prompts of LLaMA-Adapter) is another input
            return lora_products(x, [linear.adapted()], linear.dropped_share)[0]
        if self._x is not x or linear not in self._waiting:
            outputs = lora_products(x, [each.adapted() for each in self.linears], linear.dropped_share)
            self._x, self._waiting = x, dict(zip(self.linears, outputs, strict=True))
        y = self._waiting.pop(linear)
        if not self._waiting:
            self._x, self._are_served = None, True
        return y

    def parent_is_done(self, _parent: nn.Module, _args: tuple, output: object) -> None:
        """Let go of what nobody has asked for. Called after each forward pass of the parent, with ``output`` None where it failed."""
        if self._waiting and output is not None:
            # Not siblings, whatever their names: each is computed for itself from now on.
            for linear in self.linears:
                linear.siblings = None
        self._x, self._waiting, self._are_served = None, {}, False


def join_siblings(model: nn.Module) -> None:
    """Let plain LoRA's linears that see one input be computed together: those of an attention and those of an MLP."""
    for parent in model.modules():
        for names in SIBLINGS:
            linears = [getattr(parent, name, None) for name in names]
            if all(type(each) is LoRALinear for each in linears):
                parent.register_forward_hook(Siblings(linears).parent_is_done, always_call=True)


class DoRALinear(LoRALinear):
    """LoRA on the weight's direction, with each row's length m trained apart: W' = m (W + sBA) / ||W + sBA||_row.

    Liu et al. 2024, arXiv:2402.09353, section 4.1; the norm counts as a constant in the gradient (section 4.3).
    """

    def __init__(self, base: nn.Module, rank: int, scaling: float, dropout: float):
        super().__init__(base, rank, scaling, dropout)
        square = dense_weight(base).square().sum(dim=1)
        self.register_buffer("weight_square", square, persistent=False)
        # float32: rounded to bfloat16 the rows would start up to 0.2 % off, and the model would not start as its base.
        self.lora_magnitude_vector = nn.Parameter(square.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.dropout(x)
        # Dropout belongs to the whole adapted term, so the base is asked again where dropout changes x.
        y = self.base(x)
        bias = 0 if self.base.bias is None else self.base.bias
        plain = (y if dropped is x else self.base(dropped)) - bias
        gain = self.lora_magnitude_vector / self.row_norm()
        update = self.lora_B(self.lora_A(dropped)) * self.scaling
        return y + plain * (gain - 1).to(x.dtype) + update * gain.to(x.dtype)

    @torch.no_grad()
    def row_norm(self) -> Tensor:
        """Return ||W + sBA|| of each row, [out] float32, without forming W + sBA: |w|^2 + 2s (W A^T) b + s^2 b (A A^T) b."""
        A, B = self.lora_A.weight.float(), self.lora_B.weight.float()
        cross = (self._base_times(A) * B).sum(dim=1)
        own = (B @ (A @ A.T) * B).sum(dim=1)
        return (self.weight_square + 2 * self.scaling * cross + self.scaling**2 * own).clamp(min=0).sqrt()

    def _base_times(self, A: Tensor) -> Tensor:
        """Return W A^T, [out, R] float32."""
        dense = dense_weight(self.base, compute_dtype(self.base))
        return (dense @ A.T.to(dense.dtype)).float()

    def merged_weight(self, dense: Tensor) -> Tensor:
        adapted = super().merged_weight(dense)
        return adapted * (self.lora_magnitude_vector / adapted.norm(dim=1)).unsqueeze(1)


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
        assert not any(isinstance(token, str) for token in (*self.trained_tokens, *self.new_tokens)), "resolved() was not called"
        rows = rows_to_train(model, self.trained_tokens, {*chosen, *whole}) if self.trained_tokens else {}
        adapt_linears(model, self.targets, self._adapt)
        join_siblings(model)
        train_whole(model, whole)
        train_rows(model, rows)

    def options_of(self, name: str, tensor: nn.Parameter) -> dict[str, object]:
        return {"lr_ratio": self.b_lr_ratio} if self.b_lr_ratio != 1 and name.endswith(".lora_B.weight") else {}

    def _adapt(self, name: str, base: nn.Module) -> LoRALinear:
        if not is_linear(base):
            raise RecipeError(f"method.name: {name} is adapted by another of the methods already, and LoRA needs its own weight")
        rank = self.rank_of(name)
        smaller = min(base.in_features, base.out_features)
        if rank > smaller:
            raise RecipeError(
                f"method.rank: {rank} is more than {name} can have ({smaller}); lower it, or set it apart in method.rank_per_target"
            )
        return (DoRALinear if self.dora else LoRALinear)(base, rank, self.scaling_of(name, rank), self.dropout)

    def scaling_of(self, name: str, rank: int) -> float:
        """Return what B A is multiplied by in the linear with dotted name ``name`` and ``rank``."""
        return self.alpha_of(name) / (math.sqrt(rank) if self.rslora else rank)

    def rank_of(self, name: str) -> int:
        """Return the rank of the linear with dotted name ``name``."""
        return next((rank for pattern, rank in self.rank_per_target.items() if matches(name, pattern)), self.rank)

    def alpha_of(self, name: str) -> float:
        """Return the alpha of the linear with dotted name ``name``."""
        return next((alpha for pattern, alpha in self.alpha_per_target.items() if matches(name, pattern)), self.alpha)
