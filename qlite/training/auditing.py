"""The audit of an export: over which weights it answers most as the run does, whether that is near enough, what is left of training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlite.data.encode import Encoded
from qlite.errors import DataError, ExportError, RecipeError
from qlite.formats.merged import Dense, joined, merged_tensors
from qlite.model.originals import Originals
from qlite.serving.answer import Sampling, answer_ids
from qlite.serving.merge_audit import Agreement, LiveModel, Weights
from qlite.serving.survival import Survival, survival
from qlite.training.open_run import OpenRun
from qlite.training.report import Observer

Onto = Literal["dequantised", "original"]
Rounding = Callable[[Dense], Iterator[Tensor]]
"""Yields a merged tensor as it will be read out of the file, some rows at a time."""
FILE = "audit.json"
ENOUGH_LEFT = 0.9
"""Share of what training changed, in KL, below which a user is told what would keep more."""


@dataclass(frozen=True)
class Audit:
    """What was found, and what was done."""

    onto: Onto
    rows: int = 0
    are_held_out: bool = True
    found: dict[Onto, Agreement] = field(default_factory=dict)
    base: Agreement | None = None
    """Of the model without its adapter: what training has changed."""
    survival: dict[str, Survival] = field(default_factory=dict)
    """Of what is stored in few bits: what is left of training in each adapted linear."""
    written: Agreement | None = None
    """What the files say once they are read back."""

    @property
    def left(self) -> float | None:
        """The share of what training changed that the export still does: 1 - KL(run || export) / KL(run || base). None: not known."""
        if self.base is None or not self.base.kl > 0 or self.onto not in self.found:
            return None
        return max(0.0, 1 - self.found[self.onto].kl / self.base.kl)

    @property
    def all_survival(self) -> Survival:
        """That of all adapted linears together."""
        return sum(self.survival.values(), Survival(0, 0, 0))

    def as_record(self) -> dict:
        candidates = {name: each.as_record() for name, each in self.found.items()}
        written, base = (each and each.as_record() for each in (self.written, self.base))
        layers = {name: {"kept": each.kept, "noise": each.noise} for name, each in self.survival.items()}
        record = {"onto": self.onto, "rows": self.rows, "held_out": self.are_held_out, "candidates": candidates, "written": written}
        return {**record, "base": base, "left": self.left, "survival": layers}

    @classmethod
    def of_record(cls, record: dict) -> "Audit":
        """Return what ``as_record`` told before anything was written."""
        base = record["base"] and Agreement(**record["base"])
        found = {name: Agreement(**each) for name, each in record["candidates"].items()}
        return cls(record["onto"], record["rows"], record["held_out"], found, base)

    def lines(self) -> list[str]:
        """Return it as Markdown."""
        if not self.found:
            return [f"Merged over the {self.onto} weights; it was not compared with the run (`--audit-rows 0`)."]
        of = "held-out rows" if self.are_held_out else "training rows, for the run has held out none"
        lines = [
            f"The run itself and the merged weights, on {self.rows} {of}. KL: mean over their trained tokens of KL(run || merged).",
            "",
            "| merged over | KL, nats a token | same likeliest token | loss, the run's | same greedy answers | most changed linear |",
            "|---|---|---|---|---|---|",
        ]
        for name, each in self.found.items():
            mark = " (written)" if name == self.onto else ""
            layer, error = each.worst_layer
            lines.append(f"| the {name} weights{mark} {_cells(each)} | {error:.1e}, {layer} |")
        if self.base:
            lines.append(f"| nothing: the untrained base {_cells(self.base)} | |")
        if self.left is not None:
            lines += ["", f"Of what training changed (KL of run and base), {self.left:.1%} is left."]
        if self.survival:
            lines += [f"Of the changes of the weights themselves: {self._survival_words()}."]
        return lines

    def advice(self) -> str | None:
        """Return what would keep more of what was learned, where much of it is lost."""
        if self.left is None or self.left >= ENOUGH_LEFT:
            return None
        lost = f"only {self.left:.0%} of what training changed is left (KL of run and base)"
        if not self.survival:
            return f"{lost}: trained for longer or with a higher rate the adapter would stand out from what merging rounds"
        whole = self.all_survival
        if whole.kept < 0.5:
            why = f"the base's weights lie on this type's own steps, to which {1 - whole.kept:.0%} of the changes are rounded back"
        else:
            why = f"what it rounds is {whole.noise:.0f} times what training changed"
        return (
            f"{lost}: {why}. A type of more bits keeps more (q8_0, f16), and so does the adapter beside the base's own file: --gguf-adapter"
        )

    def _survival_words(self) -> str:
        whole = self.all_survival
        worst = min(self.survival, key=lambda name: self.survival[name].kept)
        return (
            f"{whole.kept:.0%} is there after rounding, under noise {whole.noise:.1f} times as large; least of it in {worst} "
            f"({self.survival[worst].kept:.0%})"
        )


def _cells(each: Agreement) -> str:
    return f"| {each.kl:.2e} | {each.top1:.2%} | {each.loss:.4f}, {each.live_loss:.4f} | {each.same_answers} of {each.answers}"


class MergedWeights:
    """The weights of ``model`` with its adapter, as ``rounding`` leaves them."""

    def __init__(self, model: PreTrainedModel, rounding: Rounding, originals: Originals | None):
        self._tensors = {tensor.name: tensor for tensor in merged_tensors(model, originals)}
        self._rounding = rounding
        names = {module: f"{name}.weight" for name, module in model.named_modules()}
        head, embedding = names[model.get_output_embeddings()], names[model.get_input_embeddings()]
        if head not in self._tensors:  # it is the embedding's tensor, and written under its name
            self._tensors[head] = self._tensors[embedding]

    def __call__(self, name: str) -> Iterator[Tensor]:
        return self._rounding(self._tensors[name])


class Auditor:
    """Compares what is to be written with ``opened``, its adapter on it."""

    def __init__(self, opened: OpenRun, count: int, console: Observer):
        """count: held-out rows that are looked at; 0: none, and nothing is compared.

        Raises:
            DataError: the rows of the run cannot be read any more.
        """
        self.opened, self._console = opened, console
        model = opened.base.model
        self._names = {tensor.name for tensor in merged_tensors(model)}
        self.rows, self._are_held_out = held_out_rows(opened, count, console) if count else ([], True)
        answers = _answers(opened, self.rows, console)
        self._live = LiveModel(model, self.rows, answers, opened.encoder.pad_id, partial(console.phase, "the run on these rows"))

    def originals(self, checkpoint: object, onto: Onto = "original") -> Originals | None:
        """Return the weights of ``checkpoint``'s files as the model names them; none to merge over where ``onto`` is "dequantised"."""
        return Originals(self.opened.base.model, checkpoint, self._names) if onto == "original" else None

    def chosen(self, rounding: Rounding, onto: Onto | None) -> Audit:
        """Return over which weights the export is to be merged, and why. ``onto``: over these."""
        base, stored = self.opened.base, self.opened.recipe.base
        is_packed = min(stored.bits, stored.embedding_bits, stored.head_bits) < 16
        asked: list[Onto] = [onto] if onto else ["dequantised", "original"] if is_packed else ["dequantised"]
        trains_base = self.opened.method.trains_base
        if trains_base and asked[0] == "original":
            raise RecipeError(
                f"--onto original: this run has trained the weights themselves ({self.opened.method.words}), so there is nothing to merge "
                "over others; leave it out"
            )
        if not self.rows:
            return Audit(asked[0])
        found = {}
        for name in asked:
            weights = MergedWeights(base.model, rounding, self.originals(base.checkpoint, name))
            found[name] = self._live.compared(weights, partial(self._console.phase, f"merged over the {name} weights"))
        best = min(found, key=lambda each: found[each].kl)
        told = partial(self._console.phase, "the base without its adapter")
        base_alone = None if trains_base else self._live.compared_to_base(told)
        return Audit(best, len(self.rows), self._are_held_out, found, base_alone)

    def require_near(self, audit: Audit, most_kl: float) -> None:
        """Raise ExportError where what ``audit`` has chosen answers otherwise than the run."""
        if not audit.found or audit.found[audit.onto].kl <= most_kl:
            return
        apart = "; the adapter alone: --adapter" if self.opened.run.is_known_to_peft else ""
        why = f". {advice[0].upper()}{advice[1:]}" if (advice := audit.advice()) else ""
        raise ExportError(
            f"merged over the {audit.onto} weights the model answers otherwise than the run: KL {audit.found[audit.onto].kl:.3g} nats a "
            f"token on {audit.rows} rows, and at most {most_kl:g} is allowed (--most-kl). Nothing was written{apart}{why}"
        )

    def with_survival(self, audit: Audit, rounding: Rounding) -> Audit:
        """Return ``audit`` with what is left of training's changes of the weights after ``rounding``."""
        base = self.opened.base
        originals = self.originals(base.checkpoint, audit.onto)
        return replace(audit, survival=survival(base.model, originals, rounding, partial(self._console.phase, "what rounding leaves")))

    def read_back(self, audit: Audit, checkpoint: object, rounding: Rounding) -> Audit:
        """Return ``audit`` with what the weights in ``checkpoint``, just written, answer.

        Raises:
            ExportError: that is not what was compared before, or what is no matrix (norms, biases) is not what ``rounding`` makes of it.
        """
        written = self.originals(checkpoint)
        for dense in merged_tensors(self.opened.base.model, self.originals(self.opened.base.checkpoint, audit.onto)):
            if len(dense.shape) < 2 and not _is_same(joined(written.parts(dense.name)), joined(rounding(dense))):
                raise ExportError(f"{dense.name}: what was written is not what the run has")
        if not audit.found:
            return audit
        weights: Weights = written.parts
        found = self._live.compared(weights, partial(self._console.phase, "what was written"), with_layers=False)
        promised = audit.found[audit.onto]
        if not abs(found.kl - promised.kl) <= 1e-3 * promised.kl + 1e-9 or found.same_answers != promised.same_answers:
            raise ExportError(
                f"what was written answers otherwise than what was compared: KL {found.kl:.3g} and {promised.kl:.3g} nats a token"
            )
        return replace(audit, written=replace(found, layers=promised.layers))


def _is_same(written: Tensor, expected: Tensor) -> bool:
    # Some of GGUF's norms are stored as 1 + weight, in float32.
    return torch.allclose(written.float(), expected.float(), rtol=1e-6, atol=2e-7)


def held_out_rows(opened: OpenRun, count: int, console: Observer) -> tuple[list[Encoded], bool]:
    """Return the first ``count`` held-out rows, or training rows where there are none, and whether they are held out."""
    try:
        data = opened.recipe.data.load(opened.base.tokenizer, opened.recipe.train.tokens, lambda _: None, console.phase, opened.encoder)
    except DataError as error:
        raise DataError(f"an export is compared with the run on its rows, and {error}. Without comparing: --audit-rows 0") from error
    opened.note_other_rows(data, console.note)
    rows = data.test if len(data.test) else data.train
    return [rows[index] for index in range(min(count, len(rows)))], len(data.test) > 0


def _answers(opened: OpenRun, rows: list[Encoded], console: Observer) -> list[Encoded]:
    """Return the run's own greedy answers to the questions of ``rows``, behind these; raw text asks none."""
    prompts = [list(map(int, row.ids[: row.answer_start])) for row in rows if row.answer_start]
    if not prompts:
        return []
    told = partial(_tell, console, len(prompts))
    told(0)
    found = answer_ids(opened.base.model, opened.encoder, prompts, Sampling(opened.recipe.train.answer_tokens), told)
    return [Encoded([*prompt, *new], [False] * len(prompt) + [True] * len(new)) for prompt, new in zip(prompts, found, strict=True)]


def _tell(console: Observer, total: int, done: int) -> None:
    console.phase("the run's answers", done, total)
