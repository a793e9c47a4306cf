"""One optimizer step: gradients summed over micro-batches, weighted by trained tokens, clipped, applied. It survives a full memory."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlite import device
from qlite.data.batches import Batch
from qlite.errors import Diverged, MachineError, OutOfMemory
from qlite.methods.base import Method
from qlite.model.head import hidden_states, logits_head
from qlite.offload import sent
from qlite.optim.build import FlatOptimizer
from qlite.training.limits import Limits
from qlite.training.loss import chunked_cross_entropy

Advice = Callable[[int, int, bool], list[str]]
"""Says, a line each, what would let so many rows of so many tokens fit: in training or, if not, in a pass without gradients."""


def general_advice(method: Method, rows: int, tokens: int, is_training: bool = True) -> list[str]:
    """Return the ways out that there are on every machine, for a model trained by ``method``."""
    lower = " or ".join([f"train.tokens below {tokens}", *rank_keys(method)])
    return [f"Lower {lower}, see memory.* in --keys, or free memory that other programs hold"]


def rank_keys(method: Method) -> list[str]:
    """Return the full names of ``method``'s ranks, "method.rank", or of several methods "method.lora.rank"; none where it has none."""
    parts = [part for part in method.each if hasattr(part, "rank")]
    return [f"method.{part.name}.rank" if len(method.each) > 1 else "method.rank" for part in parts]


@dataclass(frozen=True)
class StepResult:
    """``loss``: mean over the step's trained tokens, in nats; ``grad_norm``: L2 norm before clipping."""

    loss: float
    grad_norm: float
    tokens: int
    """Tokens the model read, padding not counted."""
    trained_tokens: int
    """Tokens that carried a loss."""
    oom_retries: int
    """How often the step ran out of memory and was gone on with in smaller pieces."""


class Stepper:
    """Runs forward and backward passes of one adapted model; made after the method is attached.

    Running out of memory ends no run while there is a smaller way to compute the same: what was begun is dropped and done again
    on smaller micro-batches. They are divided by the same count of trained tokens, so loss and gradient are the same but for
    the order of their sums; dropout alone draws other masks where rows are cut apart.
    """

    def __init__(self, model: PreTrainedModel, method: Method, loss_chunk: int, device: torch.device, advice: Advice | None = None):
        self.model, self.method, self.device = model, method, device
        self.advice = advice or partial(general_advice, method)
        self.head: nn.Module = logits_head(model)
        self.limits = Limits(loss_chunk)
        """In training; a run keeps them in its checkpoints."""
        self.eval_limits = Limits(loss_chunk)
        """Without gradients: what is too much then says nothing of training's bits."""
        self.tell: Callable[[str], None] = lambda _: None
        """Hears what ran out of memory and how it was gone on with."""
        self.updating: Callable[[], AbstractContextManager] = nullcontext
        """Is entered around the optimizer's step: a meter counts it apart."""
        self.before_update: Callable[[], None] = lambda: None
        """Is called before the optimizer's step, with its gradients summed and clipped."""
        self.between: Callable[[], None] = lambda: None
        """Is called before every micro-batch of a step, and may raise: the parameters are as before the step then."""
        self._doing: tuple[str, Batch] | None = None

    def step(
        self,
        batches: list[Batch],
        optimizer: FlatOptimizer,
        clip_norm: float,
        seed: tuple[int, ...] = (),
        most_loss: float = math.inf,
        summed: Tensor | None = None,
    ) -> StepResult:
        """Make one optimizer step over ``batches``. Every try begins with the generators seeded from ``seed``, if there is any.

        ``summed``: the loss, where the gradients of ``batches`` are summed already.

        Raises:
            Diverged: loss or gradient is not finite, or the loss is more than ``most_loss``; the parameters are as before.
            OutOfMemory: a single document does not fit, with the smallest loss chunk.
            MachineError: the optimizer's step does not fit. Some parameters may have been updated, and others not.
        """
        loss, accidents = summed, []
        while loss is None:
            if seed:
                device.seed_all(*seed)
            with device.Attempt() as attempt:
                loss = self.accumulate(self.limits.fit(batches))
            if attempt.ran_out:
                optimizer.zero_grad()
                accidents.append(self._make_room(self.limits))
        # Ours is one wait for the device: what is not finite must be known before it is stepped. bitsandbytes waits at its update's end.
        loss, grad_norm = torch.stack([loss, optimizer.clip(clip_norm)]).tolist()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            optimizer.zero_grad()
            raise Diverged(f"loss {loss:.4g}, gradient norm {grad_norm:.4g}: not finite")
        if loss > most_loss:
            optimizer.zero_grad()
            raise Diverged(f"loss {loss:.4g} is more than train.spike_factor allows, {most_loss:.4g}")
        self._report(accidents, "the step was made again", self.limits)
        self.before_update()
        retries = len(accidents) + self._update(optimizer)
        return StepResult(loss, grad_norm, sum(batch.tokens for batch in batches), trained_tokens(batches), retries)

    def accumulate(self, batches: list[Batch]) -> Tensor:
        """Add to the gradients that of the mean loss over all trained tokens of ``batches``; return that loss.

        Every micro-batch is divided by the tokens of all: however a step is split, its gradient is the same.
        """
        if not self.model.training:  # to ask is quicker than to tell a thousand modules
            self.model.train()
        tokens = trained_tokens(batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            self.between()
            self._doing = "forward pass", batch
            loss = self.loss(batch, tokens)
            total += loss.detach()
            penalty = self.method.penalty(self.model)
            if penalty is not None:
                loss = loss + penalty / len(batches)
            self._doing = "backward pass", batch
            device.give_back_freed(self.device)
            loss.backward()
        return total

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> float:
        """Return the mean loss over all trained tokens of ``batches``, in nats, without dropout.

        Raises:
            OutOfMemory: a single document does not fit, with the smallest loss chunk.
        """
        self.model.eval()
        tokens, total, accidents = trained_tokens(batches), 0.0, []
        waiting = self.eval_limits.fit(batches)
        while waiting:
            self._doing = "evaluation", waiting[0]
            with device.Attempt() as attempt:
                total += self.loss(waiting[0], tokens).item()
            if attempt.ran_out:
                accidents.append(self._make_room(self.eval_limits))
                waiting = self.eval_limits.fit(waiting)
            else:
                waiting.pop(0)
        self._report(accidents, "it was evaluated again", self.eval_limits)
        return total

    def _update(self, optimizer: FlatOptimizer) -> int:
        """Let ``optimizer`` step; return how often memory ran out on the way: once at most."""
        device.give_back_freed(self.device)
        for retries in range(2):
            with device.Attempt() as attempt, self.updating():
                optimizer.step()
            if not attempt.ran_out:
                if retries:
                    self.tell("out of memory in the optimizer's step: what was cached was freed, and it went on where it stood")
                return retries
            device.free_cached(self.device)
        lower = "".join(f" or lower {key}" for key in rank_keys(self.method))
        raise MachineError(
            "out of memory in the optimizer's step, also after all that was cached has been freed. Take another optimizer.name "
            f'("paged_adamw8bit" needs least){lower}'
        )

    def _make_room(self, limits: Limits) -> str:
        """Free what a failed pass has left and lower ``limits`` below what it took; return what happened, in words.

        Raises:
            OutOfMemory: there is nothing left to lower.
        """
        device.free_cached(self.device)
        doing, batch = self._doing
        rows, tokens = batch.input_ids.shape
        if not limits.lower(batch):
            least = f"it cannot be cut, and its loss is already computed on {min(limits.loss_chunk, len(batch.targets))} tokens at a time"
            message = f"out of memory in the {doing} of a single document of {tokens} tokens: {least}"
            raise OutOfMemory("\n".join([message, *self.advice(rows, tokens, limits is self.limits)]), rows, tokens)
        return f"out of memory in the {doing} of a micro-batch of {rows} x {tokens} tokens"

    def _report(self, accidents: list[str], done: str, limits: Limits) -> None:
        if accidents:
            more = f", and {len(accidents) - 1} more after it" if len(accidents) > 1 else ""
            self.tell(f"{accidents[0]}{more}: {done}, from now on with {limits}")

    def loss(self, batch: Batch, tokens: int) -> Tensor:
        """Return the loss of ``batch`` summed over its trained tokens, divided by ``tokens``."""
        # A memory plan calls this for both kinds of pass, as ``accumulate`` and ``evaluate`` do.
        chunk = (self.limits if torch.is_grad_enabled() else self.eval_limits).loss_chunk
        # Positions stay on the CPU: the documents of a line are found there without waiting for a device.
        hidden = hidden_states(self.model, sent(batch.input_ids, self.device), batch.position_ids)
        device.give_back_freed(self.device)
        predicts, targets = torch.from_numpy(batch.predicts), torch.from_numpy(batch.targets)
        return chunked_cross_entropy(self.head, hidden, predicts, targets, tokens, chunk)


def trained_tokens(batches: list[Batch]) -> int:
    """Return how many tokens of ``batches`` carry a loss; at least 1, so that it can divide."""
    return max(1, sum(batch.trained_tokens for batch in batches))
