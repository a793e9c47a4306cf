"""ReLoRA: many low-rank updates, one after another, add up to one of a high rank. Lialin et al. 2023, arXiv:2307.05695, section 3.

At a restart the update B A is merged, A is drawn anew, B is zero again, most of the optimizer's state is dropped, and the learning rate
rises anew from zero. The paper merges into W. Here W is frozen in few bits, and an update is smaller than their steps: re-quantised,
it would be gone. So what is merged is kept beside W, exactly, as frozen factors: with N restarts the result is a LoRA of rank (N + 1) R,
which merges, and is PEFT's, as such. Training is the same as over a float32 W that takes the updates, to rounding
(tests/methods/test_relora.py), and the same for every storage. The price is room for all factors from the start, and their products.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from qlite.errors import RecipeError
from qlite.methods.base import Method, Stepping, Targets, adapt_linears
from qlite.methods.lora_linear import LoRALinear, first_A, join_siblings
from qlite.methods.lora_product import Adapted
from qlite.methods.low_rank import peft_updates, require_pair


class ReLoRALinear(LoRALinear):
    """LoRA beside the updates that it has merged: past_A [N R, in], past_B [out, N R], zero where none was yet."""

    saved_buffers: ClassVar[tuple[str, ...]] = ("past_A", "past_B")

    def __init__(self, base: nn.Module, rank: int, scaling: float, dropout: float, resets: int):
        super().__init__(base, rank, scaling, dropout)
        A, B = self.lora_A.weight, self.lora_B.weight
        self.register_buffer("past_A", torch.zeros(resets * rank, self.in_features, dtype=A.dtype, device=A.device))
        self.register_buffer("past_B", torch.zeros(self.out_features, resets * rank, dtype=B.dtype, device=B.device))

    def adapted(self) -> Adapted:
        A, B = torch.cat([self.lora_A.weight, self.past_A]), torch.cat([self.lora_B.weight, self.past_B], dim=1)
        return Adapted(self.base, A, B, self.scaling)

    @torch.no_grad()
    def merge(self, number: int) -> None:
        """Keep the update as the one that restart ``number``, counted from 1, has merged."""
        place = slice((number - 1) * self.rank, number * self.rank)
        self.past_A[place] = self.lora_A.weight
        self.past_B[:, place] = self.lora_B.weight


@dataclass(frozen=True, kw_only=True)
class ReLoRA(Method):
    """LoRA that starts again several times, each time beside all that it has learned before."""

    name: ClassVar[str] = "relora"
    needs_plain_linears: ClassVar[bool] = True
    rank: Annotated[int, Field(ge=1)] = 16
    """Rank r of each of the updates."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Each update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's input that is dropped in training."""
    targets: Targets = "all-linear"
    """"all-linear", "attention", or a list of layer names or patterns: ["q_proj", "model.layers.1?.mlp.*"]."""
    resets: Annotated[int, Field(ge=1)] = 3
    """How often it starts again, cutting the run into one more part of equal lengths; the whole update has (resets + 1) times the rank."""
    warmup: Annotated[int, Field(ge=0)] = 5
    """Steps after each restart over which the learning rate rises in equal parts from 0 to the schedule's (arXiv:2307.05695, section 3)."""
    pruned: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Share of the optimizer's state, of least magnitude, that a restart sets to zero (arXiv:2307.05695, section 3); 1: all of it."""

    def check(self, steps: int) -> None:
        shortest = min(end - begin for begin, end in zip(self._cuts(steps), self._cuts(steps)[1:], strict=False))
        if shortest <= self.warmup:
            raise RecipeError(
                f"method.resets = {self.resets}, method.warmup = {self.warmup}: {steps} steps are cut into parts of {shortest}, which end "
                "within their warm-up; lower one of the two or train longer"
            )

    def attach(self, model: nn.Module) -> None:
        adapt_linears(model, self.targets, self._adapt)
        join_siblings(model)

    def _adapt(self, name: str, base: nn.Module) -> ReLoRALinear:
        require_pair(name, base, self.rank)
        return ReLoRALinear(base, self.rank, self.alpha / self.rank, self.dropout, self.resets)

    def lr_factor(self, step: int, steps: int) -> float:
        begun = max(cut for cut in self._cuts(steps)[:-1] if cut < step)
        return min(1.0, (step - begun) / self.warmup) if begun and self.warmup else 1.0

    def after_step(self, model: nn.Module, optimizer: Stepping, step: int, steps: int) -> None:
        inner = self._cuts(steps)[1:-1]
        if step in inner:
            self._restart(model, optimizer, inner.index(step) + 1)

    def _cuts(self, steps: int) -> list[int]:
        """Return the steps after which it starts again, between 0 and the last."""
        return [round(number * steps / (self.resets + 1)) for number in range(self.resets + 2)]

    def _restart(self, model: nn.Module, optimizer: Stepping, number: int) -> None:
        # A run seeds torch anew for every step, from its own seed and the step's number: so the same A is drawn after a stop,
        # and on every device, whatever the step has drawn.
        generator = torch.Generator().manual_seed(torch.initial_seed())
        values = {}
        for module in model.modules():
            if isinstance(module, ReLoRALinear):
                module.merge(number)
                values[module.lora_A.weight] = first_A(module.rank, module.in_features, generator)
                values[module.lora_B.weight] = torch.zeros(module.out_features, module.rank)
        optimizer.restart(values, self.pruned)

    def peft(self, model: nn.Module) -> tuple[dict, dict[str, Tensor]]:
        updates = {name: module.update() for name, module in model.named_modules() if isinstance(module, ReLoRALinear)}
        return peft_updates(updates)
