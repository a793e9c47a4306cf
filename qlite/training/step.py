"""One optimizer step: gradients summed over micro-batches, weighted by trained tokens, clipped, applied."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlite.data.batches import Batch
from qlite.errors import Diverged
from qlite.methods.base import Method
from qlite.model.head import hidden_states, logits_head
from qlite.optim.build import FlatOptimizer
from qlite.training.loss import chunked_cross_entropy


@dataclass(frozen=True)
class StepResult:
    """``loss``: mean over the step's trained tokens, in nats; ``grad_norm``: L2 norm before clipping."""

    loss: float
    grad_norm: float


class Stepper:
    """Runs forward and backward passes of one adapted model; made after the method is attached."""

    def __init__(self, model: PreTrainedModel, method: Method, loss_chunk: int):
        self.model, self.method, self.loss_chunk = model, method, loss_chunk
        self.head: nn.Module = logits_head(model)
        self.device = model.device

    def step(self, batches: list[Batch], optimizer: FlatOptimizer, clip_norm: float) -> StepResult:
        """Make one optimizer step over ``batches``.

        Raises:
            Diverged: loss or gradient is not finite; the parameters are as before.
        """
        loss = self.accumulate(batches)
        # The step's one wait for the device: what is not finite must be known before it is stepped.
        result = StepResult(*torch.stack([loss, optimizer.clip(clip_norm)]).tolist())
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            optimizer.zero_grad()
            raise Diverged(
                f"loss {result.loss}, gradient norm {result.grad_norm}: not finite, so nothing was updated. "
                "Lower optimizer.lr or raise schedule.warmup_steps"
            )
        optimizer.step()
        return result

    def accumulate(self, batches: list[Batch]) -> Tensor:
        """Add to the gradients that of the mean loss over all trained tokens of ``batches``; return that loss.

        Every micro-batch is divided by the tokens of all: however a step is split, its gradient is the same.
        """
        self.model.train()
        tokens = trained_tokens(batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self._loss(batch, tokens)
            total += loss.detach()
            penalty = self.method.penalty(self.model)
            if penalty is not None:
                loss = loss + penalty / len(batches)
            loss.backward()
        return total

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> float:
        """Return the mean loss over all trained tokens of ``batches``, in nats, without dropout."""
        self.model.eval()
        tokens = trained_tokens(batches)
        return sum(self._loss(batch, tokens).item() for batch in batches)

    def _loss(self, batch: Batch, tokens: int) -> Tensor:
        positions = None if batch.position_ids is None else batch.position_ids.to(self.device)
        hidden = hidden_states(self.model, batch.input_ids.to(self.device), positions)
        return chunked_cross_entropy(self.head, hidden, batch.labels, tokens, self.loss_chunk)


def trained_tokens(batches: list[Batch]) -> int:
    """Return how many tokens of ``batches`` carry a loss; at least 1, so that it can divide."""
    return max(1, sum(batch.trained_tokens for batch in batches))
