"""Merged weights with one adapter taken out and another put in: W - dW_old + dW_new in float32, rounded once, one tensor at a time.

What the first merge rounded away does not come back, and every swap rounds once more. Measured (tests/test_swap.py, ||dW|| a hundredth
of ||W||), after 1, 10 and 100 swaps the weights are so much of ||dW|| from the exact merge: float32 4e-6, 5e-6, 1e-5; float16 0.05, 0.12,
1.1; bfloat16 0.4, 0.9, 8: the errors of adapters that come again do not cancel. Without them the new adapter is merged over the base
itself (export --merge), or swapped beside it (serving/bank).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qlite.files import write_json, write_text
from qlite.formats.merged import Dense, total_bytes, write_company, write_shards
from qlite.formats.unfinished import unfinished_folder
from qlite.given import MOST_JSON_BYTES, parse_json, read_given
from qlite.methods.low_rank import LowRank
from qlite.model.checkpoint import SafetensorsCheckpoint
from qlite.model.load import dense_shapes, empty_model, own_names
from qlite.quant.linear import Storage
from qlite.room import require_space
from qlite.units import format_bytes

Updates = dict[str, LowRank]
RECORD = "swap.json"
AUDIT = "audit.json"
"""What export --merge leaves beside the weights."""
# Standard deviations of what chance alone would make of a share, beyond which it says something.
CHANCE = 5
# Of an adapter's linears. Measured (a model of 14): the merged one is within 1.3 deviations in all, a related one beyond 5 in nearly all.
NEARLY_ALL = 0.9


def swapped(weight: Tensor, old: LowRank | None, new: LowRank | None) -> Tensor:
    """Return ``weight`` [out, in] without ``old`` and with ``new``, in float32: to be rounded to the dtype that is kept.

    Each such rounding moves a value by at most half its last place; after n swaps it is at most n + 1 halves from the exact merge.
    """
    assert all(update is None or update.lengths is None for update in (old, new)), "DoRA's lengths cannot be taken out"
    found = weight.to(torch.float32, copy=True)
    if old is not None:
        found -= old.dense()
    return found if new is None else found.add_(new.dense())


@dataclass(frozen=True)
class Presence:
    """How much of an adapter is in weights: <W, dW> / ||dW||^2, 1 where it was merged into them, 0 where it was not.

    Of all linears together that is not enough: adapters of related runs share their A, so one is partly in what another was merged into,
    here more and there less than 1. Linear by linear only the merged one has 1 everywhere.
    """

    share: float
    noise: float
    """Standard deviation of the share if the weights had nothing to do with the adapter: it grows as the adapter gets smaller."""
    as_merged: int
    """In how many linears the share is that of a merge, within its chance and what the dtype rounds away."""
    as_absent: int
    """In how many it is that of weights that had nothing to do with the adapter."""
    linears: int

    @property
    def is_in(self) -> bool:
        """Whether the adapter is as good as surely in the weights."""
        return not self.is_out and self.as_absent < NEARLY_ALL * self.linears

    @property
    def is_out(self) -> bool:
        """Whether it is as good as surely not, or not as it is: with another number, or as another adapter that is like it."""
        return self.as_merged < NEARLY_ALL * self.linears


def presence(read: Callable[[str], Tensor], updates: Updates, without: Updates) -> Presence:
    """Return how much of ``updates`` is in the weights that ``read`` gives by the linear's dotted name, once ``without`` is taken out."""
    inner = square = variance = 0.0
    as_merged = as_absent = linears = 0
    for layer, update in updates.items():
        weight = read(layer)
        found, change = swapped(weight, without.get(layer), None), update.dense()
        its_square = float(change.square().sum())
        if its_square == 0:
            continue
        share = float((found * change).sum()) / its_square
        # Values that know nothing of dW add up like a random walk.
        spread = float(weight.float().square().mean() / its_square) ** 0.5
        # A base whose values have few digits loses to rounding what is below them; one that had more loses nothing on average.
        kept = _kept(found, change, weight.dtype)
        as_merged += min(1.0, kept) - CHANCE * spread <= share <= max(1.0, kept) + CHANCE * spread
        as_absent += abs(share) <= CHANCE * spread
        linears += 1
        inner, square, variance = inner + share * its_square, square + its_square, variance + (spread * its_square) ** 2
    if not linears:
        return Presence(0.0, float("inf"), 0, 0, 0)
    return Presence(inner / square, variance**0.5 / square, as_merged, as_absent, linears)


def _kept(merged: Tensor, change: Tensor, dtype: torch.dtype) -> float:
    """Return how much of ``change`` [out, in] a merge leaves, if ``merged`` is its result and the base was in ``dtype``, too."""
    base = (merged - change).to(dtype).float()
    left = (base + change).to(dtype).float().sub_(base)
    return float((left * change).sum() / change.square().sum())


@dataclass(frozen=True)
class Holdings:
    """Which adapters are in merged weights, as the folder's own records say: the SHA-256 of their files of tensors."""

    hashes: tuple[str, ...]
    is_all: bool
    """Whether no other adapter is in them."""

    def after(self, removed: str | None, added: str | None) -> "Holdings":
        """Return what is in the weights once ``removed`` is taken out and ``added`` put in."""
        kept = tuple(each for each in self.hashes if each != removed)
        return Holdings(kept if added is None else (*kept, added), self.is_all)


class MergedFolder:
    """A folder of merged weights, whose linears are found by the dotted names that adapters know them by."""

    def __init__(self, checkpoint: SafetensorsCheckpoint):
        """Raises ModelError where config and weights cannot be used."""
        self.checkpoint = checkpoint
        model = empty_model(checkpoint.config(), Storage(16), torch.float32, "cpu")
        found = own_names(model, checkpoint.order(), dense_shapes(model))
        self._source = {own.removesuffix(".weight"): source for source, own in found.items() if own and own.endswith(".weight")}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight by its module's dotted name."""
        shapes = self.checkpoint.shapes()
        return {layer: shapes[source] for layer, source in self._source.items()}

    def swaps(self) -> int:
        """Return how many swaps these weights have behind them, as far as their record says."""
        count = self._said(RECORD).get("swaps")
        return count if type(count) is int else 0

    def holdings(self) -> Holdings:
        """Return which adapters are in these weights, as the record of the last swap says, or else that of the merge."""
        said = self._said(RECORD)
        if not said:
            merged = self._said(AUDIT).get("adapter_sha256")
            return Holdings((merged,), True) if isinstance(merged, str) else Holdings((), False)
        hashes = said.get("holds")
        if not isinstance(hashes, list) or not all(isinstance(each, str) for each in hashes):
            return Holdings((), False)
        return Holdings(tuple(hashes), said.get("holds_all") is True)

    def _said(self, name: str) -> dict:
        """Return what the folder's record ``name`` says; nothing where it cannot be read."""
        try:
            found = parse_json(read_given(self.checkpoint.files.folder / name, MOST_JSON_BYTES))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def read(self, layer: str) -> Tensor:
        """Return a module's weight in its file's dtype; to be read only."""
        return self.checkpoint.read(self._source[layer])

    def write_swapped(
        self,
        out: Path,
        old: Updates,
        new: Updates,
        tokenizer: PreTrainedTokenizerBase,
        generation: GenerationConfig | None,
        record: dict,
        told: Callable[[int, int], None],
    ) -> None:
        """Write the folder ``out``: the same in the same dtypes, ``old`` taken out and ``new`` put in; ``record`` is kept beside it.

        Raises:
            ExportError: a value is not finite, or does not fit the dtype any more.
            MachineError: the disk does not take it.
        """
        checkpoint, layers = self.checkpoint, {source: layer for layer, source in self._source.items()}
        shapes, dtypes = checkpoint.shapes(), checkpoint.dtypes()

        def part(source: str) -> list[Tensor]:
            layer = layers.get(source)
            weight = checkpoint.read(source)
            return [swapped(weight, old.get(layer), new.get(layer))] if layer in old or layer in new else [weight]

        tensors = [Dense(source, shapes[source], partial(part, source), dtypes[source]) for source in checkpoint.order()]
        # The dtype counts where a tensor has none of its own; here each stays what it is.
        total = total_bytes(tensors, torch.float16)
        require_space(out, total, f"{format_bytes(total)} of weights")
        with unfinished_folder(out, None) as made:
            folder = made.path
            write_shards(made, tensors, {source: source for source in shapes}, torch.float16, told)
            write_text(folder / "config.json", (checkpoint.files.folder / "config.json").read_text(encoding="utf-8"))
            write_company(folder, tokenizer, generation)
            write_json(folder / RECORD, record)
