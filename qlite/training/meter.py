"""What a run holds, as it goes: the device's own counters at every step, and every tensor by its term in those that are followed."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from qlite import device
from qlite.memory import terms
from qlite.memory.ledger import Ledger, Peak
from qlite.memory.plan import MemoryPlan
from qlite.model.blocks import decoder_blocks
from qlite.optim.build import FlatOptimizer
from qlite.training.forecast import ANSWERS, ATTACH, EVALUATION, LOAD, OPTIMIZER_STEP, STEP, adopt_all, largest
from qlite.training.planning import compared
from qlite.training.step import Stepper

FIRST_FOLLOWED = 2
"""Steps followed at the start: the largest micro-batch comes first, and the optimizer's state is there from the second on."""
FOLLOWED_EVERY = 50
"""Steps between those that are followed afterwards. Following one takes up to a tenth of its time on small models."""


class Meter:
    """Memory of one run on one device."""

    def __init__(self, where: torch.device):
        self.plan: MemoryPlan | None = None
        self._counters = device.MemoryMeter(where)
        self._ledger = Ledger()
        self._parts: tuple[nn.Module, FlatOptimizer] | None = None
        self._blocks: list[nn.Module] = []
        self._steps = 0
        self._seen: set[str] = set()
        self._last: Peak | None = None

    def loading(self):
        """Enter what loads the base."""
        return self._phase(LOAD, terms.BASE)

    def attaching(self):
        """Enter what puts the adapter on."""
        return self._phase(ATTACH, terms.ADAPTER)

    def follow(self, stepper: Stepper, optimizer: FlatOptimizer) -> None:
        """Know what lasts from here on, and hear of the optimizer's steps. Called once, before the first."""
        self._parts, self._blocks = (stepper.model, optimizer), list(decoder_blocks(stepper.model).values())
        stepper.updating = self._updating
        adopt_all(self._ledger, *self._parts)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Enter a training step: it is followed if it is one of the first, and now and then."""
        self._steps += 1
        if self._steps > FIRST_FOLLOWED and self._steps % FOLLOWED_EVERY:
            yield
            return
        before = {moment: self._ledger.moments.pop(moment) for moment in list(self._ledger.moments) if moment[0] == STEP}
        try:
            with self._following(STEP):
                yield
        finally:
            adopt_all(self._ledger, *self._parts)
            moments = self._ledger.moments
            self._last = largest(moments)[STEP]
            moments |= {moment: peak for moment, peak in before.items() if peak.bytes > moments.get(moment, Peak()).bytes}

    def evaluating(self):
        """Enter an evaluation: the first is followed."""
        return self._first(EVALUATION, terms.SAVED)

    def answering(self):
        """Enter what lets the model answer: the first is followed."""
        return self._first(ANSWERS, terms.CACHE)

    def read(self) -> device.MemoryUse:
        """Return the device's counters and, by term, the peak of the last step that was followed."""
        told = {term: self._last.terms[term] for term in terms.ALL if term in self._last.terms} if self._last else None
        planned = self.plan.phases[STEP].bytes if self.plan else None
        return replace(self._counters.read(), terms=told, planned=planned)

    def compared(self) -> dict:
        """Return plan against measured, for the run's folder."""
        return compared(self.plan, self._ledger.moments, device.peak_process_bytes())

    @contextmanager
    def _phase(self, name: str, default: str = terms.WORKSPACE, kept: str = terms.SAVED) -> Iterator[None]:
        with self._ledger, self._ledger.phase(name, default, kept):
            yield

    @contextmanager
    def _following(self, name: str, kept: str = terms.SAVED) -> Iterator[None]:
        with self._ledger.following(self._parts[0], self._blocks), self._phase(name, kept=kept):
            yield

    def _first(self, name: str, kept: str):
        if name in self._seen:
            return nullcontext()
        self._seen.add(name)
        return self._following(name, kept)

    @contextmanager
    def _updating(self) -> Iterator[None]:
        with self._ledger.phase(OPTIMIZER_STEP, terms.OPTIMIZER):
            yield
