"""The audited merge: over which weights, whether what comes out answers as the run does, and whether what was written is that."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig

from qlite.errors import ExportError, RecipeError
from qlite.files import new_folder, write_json, write_text
from qlite.formats.card import GGUF, MERGED, Kind
from qlite.formats.gguf_merged import StoredAs, require_gguf_tokenizer, write_merged_gguf
from qlite.formats.gguf_types import GgufType
from qlite.formats.merged import SHARD_BYTES, cast, ended_by, require_room, write_company, write_weights
from qlite.formats.peft import WEIGHTS
from qlite.formats.unfinished import unfinished_folder
from qlite.hashes import code_hash, sha256, short_hash
from qlite.model.checkpoint import open_checkpoint
from qlite.model.load import dense_shapes, empty_model, own_names
from qlite.model.source import ModelFiles
from qlite.quant.linear import Storage
from qlite.training.auditing import FILE, Audit, Auditor, Onto
from qlite.training.cards import run_card
from qlite.training.gguf_facts import run_modelfile, run_saying
from qlite.training.open_run import OpenRun
from qlite.training.provenance import versions
from qlite.training.report import Observer

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Merge:
    """How a run is merged."""

    dtype: torch.dtype = torch.float16
    """Of a folder's weights."""
    onto: Onto | None = None
    """None: what the audit finds nearer to the run."""
    rows: int = 16
    """Held-out rows that it is checked on; 0: it is not."""
    most_kl: float | None = None
    """Mean KL, nats a token, beyond which nothing is written; None: 0.1, of less than 8 bits 0.5."""
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self):
        if self.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise RecipeError(f"merged weights in {self.dtype}: should be torch.float16, torch.bfloat16 or torch.float32")
        if self.onto not in (None, "dequantised", "original"):
            raise RecipeError(f'merged onto "{self.onto}": should be "dequantised" or "original"')
        if self.rows < 0 or not (self.most_kl is None or self.most_kl > 0):
            raise RecipeError(f"--audit-rows {self.rows}, --most-kl {self.most_kl}: should be 0 or more, and more than 0")

    def limit(self, bits: float) -> float:
        """Return ``most_kl`` for what is stored in ``bits`` a value."""
        return self.most_kl if self.most_kl is not None else 0.1 if bits >= 8 else 0.5


def write_audited(opened: OpenRun, out: Path, merge: Merge, console: Observer) -> Audit:
    """Merge ``opened``, its adapter on it, into the folder ``out``: compare, choose, write, read back and compare again.

    Raises:
        ExportError: the merged model answers otherwise than the run, or the files are not what was compared; nothing is written then.
        DataError: the rows of the run cannot be read any more.
    """
    base, rounding = opened.base, partial(cast, dtype=merge.dtype)
    # The folder first: what stands there, or a full disk, is known before minutes of comparing.
    with unfinished_folder(out, _key(opened, merge)) as made:
        folder = made.path
        require_room(made, base.model, merge.dtype)
        auditor = Auditor(opened, merge.rows, console)
        if made.findings:
            console.note("going on with an export that was stopped: compared before, written from its first unfinished file on")
            audit = Audit.of_record(made.findings)
        else:
            audit = auditor.chosen(rounding, merge.onto)
            auditor.require_near(audit, merge.limit(16))
            made.find(audit.as_record())
        originals = auditor.originals(base.checkpoint, audit.onto)
        write_weights(made, base.model, merge.dtype, console.phase, merge.shard_bytes, originals)
        write_company(folder, base.tokenizer, _generation(opened))
        checkpoint = open_checkpoint(ModelFiles(folder, None, str(folder)))
        _require_described(checkpoint, opened)
        audit = auditor.read_back(audit, checkpoint, rounding)
        write_json(folder / FILE, {"dtype": str(merge.dtype)[6:], **_record(opened, audit)})
        write_text(folder / "README.md", _card(opened, MERGED, str(merge.dtype)[6:], audit))
    return audit


def write_audited_gguf(opened: OpenRun, out: Path, file: str, as_type: GgufType, merge: Merge, console: Observer) -> Audit:
    """Merge ``opened``, its adapter on it, into ``file``, a GGUF file of ``as_type`` in the folder ``out``: as ``write_audited`` does.

    What is compared are the weights as llama.cpp will dequantise them. Raises: as ``write_audited``, and where llama.cpp has no such model.
    """
    base, rounding = opened.base, StoredAs(opened.base, as_type)
    with new_folder(out) as folder:
        require_gguf_tokenizer(base)
        auditor = Auditor(opened, merge.rows, console)
        audit = auditor.chosen(rounding, merge.onto)
        if as_type.bits < 16 and audit.found:
            audit = auditor.with_survival(audit, rounding)
        auditor.require_near(audit, merge.limit(as_type.bits))
        originals = auditor.originals(base.checkpoint, audit.onto)
        write_merged_gguf(folder / file, base, run_saying(opened, opened.run.path.resolve().name), as_type, console.phase, originals)
        audit = auditor.read_back(audit, open_checkpoint(ModelFiles(folder, file, file)), rounding)
        write_json(folder / FILE, {"type": as_type.name, **_record(opened, audit)})
        write_text(folder / "README.md", _card(opened, GGUF, as_type.name, audit))
        if (text := run_modelfile(opened, file, is_adapter=False)) is not None:
            write_text(folder / "Modelfile", text)
    return audit


def _record(opened: OpenRun, audit: Audit) -> dict:
    return {"adapter_sha256": sha256(opened.run.adapter / WEIGHTS), **audit.as_record()}


def _generation(opened: OpenRun) -> GenerationConfig:
    """Return how the base asks to be sampled, with the end of a turn in the run's template as an end of answers, too."""
    base = opened.base
    own = base.generation_config or GenerationConfig.from_model_config(base.model.config)
    return ended_by(own, opened.encoder.stop_ids)


def _key(opened: OpenRun, merge: Merge) -> str:
    """Return what tells an export from all others: of this adapter over this base, made and looked at so, by this code."""
    facts = [sha256(opened.run.adapter / WEIGHTS), opened.base.identity, str(merge), versions(), code_hash([PACKAGE / "formats"], ())]
    return short_hash(json.dumps(facts))[:16]


def _require_described(checkpoint: object, opened: OpenRun) -> None:
    """Raise ExportError unless the files of ``checkpoint`` hold what their config describes, and the base's tokenizer."""
    plain = empty_model(checkpoint.config(), Storage(16), torch.float32, "cpu")
    expected = dense_shapes(plain)
    own, shapes = own_names(plain, checkpoint.order(), expected), checkpoint.shapes()
    wrong = [source for source, name in own.items() if name is None or shapes[source] != expected[name]]
    lacking = set(expected) - set(own.values()) - _may_be_tied(plain)
    if wrong or lacking:
        raise ExportError(f"the merged files are not what their config.json describes: {', '.join(sorted([*wrong, *lacking])[:3])}")
    if checkpoint.tokenizer().get_vocab() != opened.base.tokenizer.get_vocab():
        raise ExportError("the tokenizer that was written is not the base's")


def _may_be_tied(model: nn.Module) -> set[str]:
    """Return the head's weight where the config ties it: it has no tensor of its own then."""
    head = model.get_output_embeddings()
    return {f"{name}.weight" for name, module in model.named_modules() if module is head and model.config.tie_word_embeddings}


def _card(opened: OpenRun, kind: Kind, weights: str, audit: Audit) -> str:
    over = {} if opened.method.trains_base else {"merged over": f"the {audit.onto} weights"}
    facts = {**over, "weights": weights}
    return run_card(opened.run, kind, facts, {"How the merge was checked": audit.lines()})
