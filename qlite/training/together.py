"""Several runs over one base, step by step together: the rows of all go through the frozen weights in one pass.

Each run is what it is alone: it has its rows, its schedule, its optimizer, its folder. Only the sums of its gradients come from passes
that it shares, so they are the same but for rounding; and no gradient is mixed with another's, for the rows of a batch do not meet.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlite import device
from qlite.data.ahead import Ahead
from qlite.data.batches import Batch
from qlite.data.encode import IGNORED
from qlite.errors import Diverged
from qlite.methods.together import Groups
from qlite.model.head import hidden_states, logits_head
from qlite.offload import sent
from qlite.recipe.schema import Recipe
from qlite.stopping import Stopped, StoppedAtOnce, stopping_softly
from qlite.training import divergence
from qlite.training.loss import chunked_cross_entropy
from qlite.training.parts import Parts
from qlite.training.report import Broadcast, Observer, StopWatch
from qlite.training.run_folder import RunFolder
from qlite.training.state import TrainState
from qlite.training.step import trained_tokens
from qlite.training.steps import Begun, advance, announce, catch_up, conclude, goes_on, save


@dataclass(eq=False)
class Member:
    """One run of several, as it stands."""

    name: str
    parts: Parts
    run: RunFolder
    observer: Observer
    state: TrainState
    number: int
    """Which of the joint model's groups its rows are."""
    is_done: bool = False
    failed: Diverged | None = None

    def given(self) -> tuple[Recipe, Parts, RunFolder, Observer, TrainState]:
        """Return what the functions of a single run take."""
        return self.parts.recipe, self.parts, self.run, self.observer, self.state

    def goes_on(self) -> bool:
        """Return whether it has a step to make; its observer hears why not, once."""
        if not self.is_done:
            self.is_done = not goes_on(self.parts.recipe, self.parts, self.observer, self.state)
        return not self.is_done


class Together:
    """Sums the gradients of one step of several runs in passes that they share."""

    def __init__(self, model: PreTrainedModel, groups: Groups, where: torch.device, most: int):
        """``model``: the joint one, whose ``groups`` say which rows are whose; ``most``: runs that share a pass."""
        self.model, self.groups, self.device, self.most = model, groups, where, most
        self.head = logits_head(model)
        self.tell: Callable[[str], None] = lambda _: None
        self.between: Callable[[], None] = lambda: None
        self.stepping: Callable[[], AbstractContextManager] = nullcontext
        """Is entered around the passes of a step: a meter follows them."""

    def begin(self, members: Sequence[Member], work: Sequence[list[Batch]]) -> dict[Member, Begun]:
        """Sum the gradients of ``work``, a step's micro-batches for each member. Those that are left out make their step alone."""
        losses: dict[Member, Tensor] = {}
        pairs, at = list(zip(members, work, strict=True)), time.perf_counter()
        while len(pairs) > 1 and self.most > 1:
            now, pairs = pairs[: self.most], pairs[self.most :]
            with device.Attempt() as attempt, self.stepping():
                losses |= self._summed(now)
            if attempt.ran_out:
                for member, _ in now:
                    member.parts.optimizer.zero_grad()
                device.free_cached(self.device)
                pairs, self.most = now + pairs, math.ceil(len(now) / 2)
                alone = "each run alone" if self.most == 1 else f"at most {self.most} runs"
                self.tell(f"out of memory in a pass of {len(now)} runs together: from now on {alone} in a pass")
        if losses and self.device.type == "cuda":
            torch.stack(list(losses.values())).cpu()  # waits for the passes, whose time is told
        seconds = time.perf_counter() - at
        return {member: Begun(loss, seconds) for member, loss in losses.items()}

    def _summed(self, pairs: Sequence[tuple[Member, list[Batch]]]) -> dict[Member, Tensor]:
        """Add to each member's gradients that of the mean loss over its step's trained tokens; return these losses."""
        first = pairs[0][0]
        device.seed_all(first.parts.recipe.train.seed, first.state.step + 1)
        self.model.train()
        counts = [trained_tokens(batches) for _, batches in pairs]
        totals = [torch.zeros((), device=self.device) for _ in pairs]
        for micro in zip_longest(*(batches for _, batches in pairs)):
            self.between()
            there = [index for index, batch in enumerate(micro) if batch is not None]
            losses = self._losses(
                [pairs[index][0] for index in there], [micro[index] for index in there], [counts[index] for index in there]
            )
            for index, loss in zip(there, losses.detach(), strict=True):
                totals[index] += loss
            device.give_back_freed(self.device)
            losses.sum().backward()
        return {member: total for (member, _), total in zip(pairs, totals, strict=True)}

    def _losses(self, members: list[Member], batches: list[Batch], counts: list[int]) -> Tensor:
        """Return the loss of each batch summed over its trained tokens, divided by its count: [N]."""
        joint = side_by_side(batches)
        self.groups.rows = tuple(len(batch.lengths) for batch in batches)
        self.groups.members = tuple(member.number for member in members)
        hidden = hidden_states(self.model, sent(joint.input_ids, self.device), joint.position_ids)
        device.give_back_freed(self.device)
        losses = []
        # Cut by one call: a slice's gradient is as large as what it was cut from.
        for own, member, batch, count in zip(hidden.split(self.groups.rows), members, batches, counts, strict=True):
            line, place = np.divmod(batch.predicts, batch.input_ids.shape[1])
            predicts, targets = torch.from_numpy(line * joint.input_ids.shape[1] + place), torch.from_numpy(batch.targets)
            losses.append(chunked_cross_entropy(self.head, own, predicts, targets, count, member.parts.stepper.limits.loss_chunk))
        return torch.stack(losses)


def side_by_side(batches: Sequence[Batch]) -> Batch:
    """Return the lines of all ``batches`` as one, as wide as the widest. What fills a packed line up is a document of its own."""
    width = max(batch.input_ids.shape[1] for batch in batches)
    ids = torch.cat([_widened(batch.input_ids, width, torch.zeros(())) for batch in batches])
    labels = torch.cat([_widened(batch.labels, width, torch.full((), IGNORED)) for batch in batches])
    lengths = tuple(length for batch in batches for length in batch.lengths)
    if batches[0].position_ids is None:
        return Batch(ids, labels, lengths)
    positions = [_widened(batch.position_ids, width, torch.arange(width - batch.position_ids.shape[1])) for batch in batches]
    return Batch(ids, labels, lengths, torch.cat(positions))


def _widened(lines: Tensor, width: int, filling: Tensor) -> Tensor:
    """Return ``lines`` [B, T] as [B, width], filled up with ``filling``."""
    wide = lines.new_empty(len(lines), width)
    wide[:, : lines.shape[1]] = lines
    wide[:, lines.shape[1] :] = filling
    return wide


def take_steps_together(members: Sequence[Member], together: Together, observer: Observer) -> None:
    """Train all ``members`` to their last steps, those that are behind first; ``observer`` hears what concerns all.

    A run that can make no more steps of finite loss ends, and the others go on.

    Raises:
        Stopped: a signal asked for it; what every run has learned is in a checkpoint.
    """
    with stopping_softly(partial(announce, observer)) as stop:
        together.between, together.tell = stop.check, observer.note
        for member in members:
            member.parts.stepper.between = stop.check
            member.observer = Broadcast(member.observer, StopWatch(stop.check))
        try:
            _all_steps(members, together)
            stop.check()  # what came during the last step is heard, too
        except StoppedAtOnce:
            raise
        except Stopped as stopped:
            for member in members:
                member.parts.optimizer.zero_grad()
                if member.state.step:
                    save(*member.given())
            steps = ", ".join(f"{member.name} after step {member.state.step}" for member in members)
            observer.note(f"stopped by {stopped.name}: {steps}")
            raise


def _all_steps(members: Sequence[Member], together: Together) -> None:
    ahead = {member: Ahead(member.parts.batches, member.parts.steps) for member in members}
    for member in members:
        member.state = catch_up(*member.given())
    while going := [member for member in members if member.failed is None and member.goes_on()]:
        step = min(member.state.step for member in going)
        now = [member for member in going if member.state.step == step]
        work = [ahead[member].step(step + 1) for member in now]
        begun, limits = together.begin(now, work), [replace(member.parts.stepper.limits) for member in now]
        # First all their steps: what is stopped in an evaluation has made its step, and no step's time holds another's evaluation.
        for member, batches in zip(now, work, strict=True):
            try:
                with nullcontext() if member in begun else together.stepping():
                    member.state = advance(*member.given(), batches, begun.get(member))
            except Diverged as error:
                member.failed = error
                member.parts.optimizer.zero_grad()
                member.observer.note(f"ends here, and the others go on: {error}")
        for member, before in zip(now, limits, strict=True):
            if member.failed is None:
                member.state = conclude(*member.given(), before)
    for member in members:
        if member.failed is None:
            try:
                divergence.require_any_step(member.state)
            except Diverged as error:
                member.failed = error
