"""The audited merge: over which weights, whether what comes out answers as the run does, and whether what was written is that."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlite.data.encode import Encoded
from qlite.errors import DataError, ExportError
from qlite.files import write_json, write_text
from qlite.formats.card import MERGED
from qlite.formats.merged import SHARD_BYTES, cast, merged_folder, merged_tensors, write_company
from qlite.model.checkpoint import open_checkpoint
from qlite.model.load import dense_shapes, empty_model, own_names
from qlite.model.originals import Originals
from qlite.model.source import ModelFiles
from qlite.quant.linear import Storage
from qlite.serving.answer import Sampling, answer_ids
from qlite.serving.merge_audit import Agreement, agreement
from qlite.training.cards import run_card
from qlite.training.open_run import OpenRun
from qlite.training.report import Observer

Onto = Literal["dequantised", "original"]
AUDIT = "audit.json"


@dataclass(frozen=True)
class Merge:
    """How a run is merged."""

    dtype: torch.dtype = torch.float16
    onto: Onto | None = None
    """None: what the audit finds nearer to the run."""
    rows: int = 16
    """Held-out rows that it is checked on; 0: it is not."""
    most_kl: float = 0.1
    """Mean KL, nats a token, beyond which nothing is written."""
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class Audit:
    """What was found, and what was done."""

    onto: Onto
    rows: int
    are_held_out: bool
    found: dict[Onto, Agreement]
    written: Agreement | None = None
    """What the files say once they are read back."""

    def as_record(self) -> dict:
        candidates = {name: each.as_record() for name, each in self.found.items()}
        written = self.written.as_record() if self.written else None
        return {"onto": self.onto, "rows": self.rows, "held_out": self.are_held_out, "candidates": candidates, "written": written}

    def lines(self) -> list[str]:
        """Return it as a Markdown table."""
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
            layer, error = each.worst_layer
            mark = " (written)" if name == self.onto else ""
            lines.append(
                f"| the {name} weights{mark} | {each.kl:.2e} | {each.top1:.2%} | {each.loss:.4f}, {each.live_loss:.4f} "
                f"| {each.same_answers} of {each.answers} | {error:.1e}, {layer} |"
            )
        return lines


def write_audited(opened: OpenRun, out: Path, merge: Merge, console: Observer) -> Audit:
    """Merge ``opened``, its adapter on it, into the folder ``out``: compare, choose, write, read back and compare again.

    Raises:
        ExportError: the merged model answers otherwise than the run, or the files are not what was compared; nothing is written then.
        DataError: the rows of the run cannot be read any more.
    """
    base = opened.base
    model, names = base.model, {tensor.name for tensor in merged_tensors(base.model)}
    originals = Originals(model, base.checkpoint, names)
    sources: dict[Onto, Originals | None] = {"dequantised": None, "original": originals}
    rows, are_held_out = _rows(opened, merge.rows, console) if merge.rows else ([], True)
    examine = partial(_examine, model, rows, _answers(opened, rows, console), opened.encoder.pad_id, console)
    stored = opened.recipe.base
    is_packed = min(stored.bits, stored.embedding_bits, stored.head_bits) < 16
    asked = [merge.onto] if merge.onto else ["dequantised", "original"] if is_packed else ["dequantised"]
    found = {}
    for name in asked if rows else ():
        found[name] = examine(f"merged over the {name} weights", MergedWeights(model, merge.dtype, sources[name]))
    onto = min(found, key=lambda each: found[each].kl) if found else asked[0]
    if found and not found[onto].kl <= merge.most_kl:
        raise ExportError(
            f"merged over the {onto} weights the model answers otherwise than the run: KL {found[onto].kl:.3g} nats a token on "
            f"{len(rows)} rows, and at most {merge.most_kl:g} is allowed (--most-kl). Nothing was written; the adapter alone: --adapter"
        )
    audit = Audit(onto, len(rows), are_held_out, found)
    with merged_folder(out, model, merge.dtype, console.phase, merge.shard_bytes, sources[onto]) as folder:
        write_company(folder, base.tokenizer, base.generation_config)
        audit = _read_back(opened, folder, audit, names, partial(examine, "what was written"))
        write_json(folder / AUDIT, {"dtype": str(merge.dtype)[6:], **audit.as_record()})
        write_text(folder / "README.md", _card(opened, merge, audit))
    return audit


class MergedWeights:
    """The weights of ``model`` as they would be written."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, originals: Originals | None):
        self._tensors = {tensor.name: tensor for tensor in merged_tensors(model, originals)}
        self._dtype = dtype
        self._tied = _tied_name(model)

    def __call__(self, name: str) -> Iterator[Tensor]:
        return cast(self._tensors.get(name) or self._tensors[self._tied], self._dtype)


def _tied_name(model: PreTrainedModel) -> str:
    """Return the embedding's name, under which a head that is tied to it is written."""
    embedding = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)


def _rows(opened: OpenRun, count: int, console: Observer) -> tuple[list[Encoded], bool]:
    """Return the first ``count`` held-out rows, or training rows where there are none, and whether they are held out."""
    try:
        data = opened.recipe.data.load(opened.base.tokenizer, opened.recipe.train.tokens, lambda _: None, console.phase, opened.encoder)
    except DataError as error:
        raise DataError(f"the merge is compared with the run on its rows, and {error}. Without comparing: --audit-rows 0") from error
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


def _examine(
    model: PreTrainedModel, rows: list[Encoded], answers: list[Encoded], pad_id: int, console: Observer, name: str, weights: object
) -> Agreement:
    return agreement(model, weights, rows, answers, pad_id, partial(console.phase, name))


def _read_back(opened: OpenRun, folder: Path, audit: Audit, names: set[str], examine) -> Audit:
    """Return ``audit`` with what the files in ``folder`` answer. Raises ExportError unless that is what was compared before."""
    model, checkpoint = opened.base.model, open_checkpoint(ModelFiles(folder, None, str(folder)))
    plain = empty_model(checkpoint.config(), Storage(16), torch.float32, "cpu")
    expected = dense_shapes(plain)
    own, shapes = own_names(plain, checkpoint.order(), expected), checkpoint.shapes()
    wrong = [source for source, name in own.items() if name is None or shapes[source] != expected[name]]
    lacking = set(expected) - set(own.values()) - _may_be_tied(plain)
    if wrong or lacking:
        raise ExportError(f"the merged files are not what their config.json describes: {', '.join(sorted([*wrong, *lacking])[:3])}")
    if checkpoint.tokenizer().get_vocab() != opened.base.tokenizer.get_vocab():
        raise ExportError("the tokenizer that was written is not the base's")
    if not audit.found:
        return audit
    written = Originals(model, checkpoint, names)
    found, promised = examine(lambda name: [written.read(name)]), audit.found[audit.onto]
    if not abs(found.kl - promised.kl) <= 1e-3 * promised.kl + 1e-9 or found.same_answers != promised.same_answers:
        raise ExportError(
            f"what was written answers otherwise than what was compared: KL {found.kl:.3g} and {promised.kl:.3g} nats a token"
        )
    return Audit(audit.onto, audit.rows, audit.are_held_out, audit.found, found)


def _may_be_tied(model: nn.Module) -> set[str]:
    """Return the head's weight where the config ties it: it has no tensor of its own then."""
    head = model.get_output_embeddings()
    return {f"{name}.weight" for name, module in model.named_modules() if module is head and model.config.tie_word_embeddings}


def _card(opened: OpenRun, merge: Merge, audit: Audit) -> str:
    facts = {"merged over": f"the {audit.onto} weights", "weights": str(merge.dtype)[6:]}
    return run_card(opened.run, MERGED, facts, {"How the merge was checked": audit.lines()})
