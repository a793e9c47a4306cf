"""Write what a run has trained: merged 16-bit weights, the adapter as PEFT's two files, or either as one GGUF file.

python -m qlite.export --merge                     newest finished run, fp16
python -m qlite.export --merge runs/mine --dtype bf16 --out exports/mine
python -m qlite.export --merge --onto original     over the base's own weights; by default over those that answer more like the run
python -m qlite.export --adapter runs/mine
python -m qlite.export --gguf q8_0                 merged, for llama.cpp and Ollama: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0
python -m qlite.export --gguf-adapter              the adapter alone, for llama.cpp's --lora
python -m qlite.export --merge --push ann/orders --dry-run      what would be sent to the Hugging Face hub; without --dry-run, send it
"""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from qlite.calls import called
from qlite.errors import ExportError, NotMergeable, RecipeError, RunError, printable
from qlite.files import MANIFEST, new_folder, write_json, write_tensors, write_text
from qlite.formats.card import ADAPTER, GGUF_ADAPTER
from qlite.formats.gguf_lora import write_adapter_gguf
from qlite.formats.gguf_types import GgufType, gguf_type
from qlite.formats.merged import SHARD_BYTES, write_company
from qlite.formats.peft import CONFIG, WEIGHTS, read_metadata, read_tensors
from qlite.hashes import sha256
from qlite.methods.lora import LoRA
from qlite.recipe.share import local_name
from qlite.stopping import Stopped
from qlite.training.auditing import Audit
from qlite.training.cards import run_card
from qlite.training.console import RunConsole
from qlite.training.gguf_facts import run_modelfile
from qlite.training.merging import Merge, write_audited, write_audited_gguf
from qlite.training.notebook import console_for
from qlite.training.open_run import OpenRun, open_run
from qlite.training.pushing import Parcel, pack, require_asked, require_repository, send
from qlite.training.report import Observer
from qlite.training.run_folder import RunFolder, find_run
from qlite.training.run_report import leave_report
from qlite.training.shown import Shown
from qlite.units import GIB, format_bytes
from qlite.verb import let_call, run_verb

QLITES_OWN = "generate, chat and evaluate answer with it as it is, and it has no form for other programs"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
COUNTS = {
    **dict.fromkeys(("dtype", "shard-gib"), ("--merge",)),
    **dict.fromkeys(("onto", "audit-rows", "most-kl"), ("--merge", "--gguf")),
    "device": ("--merge", "--gguf", "--gguf-adapter"),
}
"""Options that only some forms of export take, and which."""


def main(argv: list[str]) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)
    require_push(args.push, args.public, args.dry_run)
    _require_counting(args)
    merge = _asked_merge(args) if args.merge or args.gguf is not None else None
    adapter = "peft" if args.adapter else "gguf" if args.gguf_adapter else None
    run = find_run(args.run)
    as_type = None if args.gguf is None else gguf_type(args.gguf)
    out = args.out or run.path / _folder_name(merge, as_type, adapter)
    is_there = args.push and out.exists() and not args.force
    if is_there:
        require_newer(out, run)
    else:
        done = export(run.path, merge=merge, gguf=args.gguf, adapter=adapter, out=out, device=args.device or "auto", force=args.force)
        for line in done.lines():
            print(line)
    if args.push:
        parcel = pack(out, run.recipe(), args.push, args.public)
        if is_there:
            more = f" {as_type.name}" if as_type else f" --dtype {_dtype_name(merge)}" if merge else ""
            require_asked(out, run, _form(args) + more, args.onto)
        push(parcel, args.dry_run)
    elif args.merge:
        print(f"\nNext:  python -c \"from transformers import pipeline; print(pipeline('text-generation', '{out}'))\"")


def _parser() -> argparse.ArgumentParser:
    """Return what the command line may say. What only some forms take has no default here: so it is known what was given."""
    parser = argparse.ArgumentParser(
        prog="python -m qlite.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help="run folder; without it the newest finished one under runs/")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--merge", action="store_true", help="dequantise, merge, write a Hugging Face model folder")
    what.add_argument("--adapter", action="store_true", help="write PEFT's adapter_config.json and adapter_model.safetensors")
    what.add_argument("--gguf", metavar="TYPE", help="merge, quantise to TYPE, write one GGUF file and Ollama's Modelfile")
    what.add_argument("--gguf-adapter", action="store_true", help="write the adapter as a GGUF file")
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged weights; by default fp16")
    parser.add_argument("--out", type=Path, help="folder to write; by default inside the run's")
    parser.add_argument(
        "--onto", choices=("dequantised", "original"), help="what to merge over; by default whichever answers more like the run"
    )
    rows = f"held-out rows on which merged model and run are compared; by default {Merge.rows}"
    parser.add_argument("--audit-rows", type=int, help=rows)
    most = "nats a token between both beyond which nothing is written (0.1; of less than 8 bits 0.5)"
    parser.add_argument("--most-kl", type=float, help=most)
    parser.add_argument("--shard-gib", type=float, help=f"largest weight file; by default {SHARD_BYTES / GIB:g}")
    parser.add_argument("--device", help="where to merge: auto (unless given), cpu, cuda, cuda:1")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    parser.add_argument(
        "--push", metavar="ORG/NAME", help="send the folder to this repository of the Hugging Face hub; one that exists as it is"
    )
    parser.add_argument("--public", action="store_true", help="with --push: a new repository can be read by anybody, not by you alone")
    parser.add_argument("--dry-run", action="store_true", help="with --push: say what would be sent, and send nothing")
    return parser


def _form(args: argparse.Namespace) -> str:
    return "--merge" if args.merge else "--gguf" if args.gguf is not None else "--adapter" if args.adapter else "--gguf-adapter"


def _require_counting(args: argparse.Namespace) -> None:
    """Raise RecipeError if an option is given that the form of export which is asked for does not take."""
    form = _form(args)
    problems = [
        f"--{option}: counts with {' or '.join(where)}, and this is {form}"
        for option, where in COUNTS.items()
        if getattr(args, option.replace("-", "_")) is not None and form not in where
    ]
    if problems:
        raise RecipeError(problems)


def _asked_merge(args: argparse.Namespace) -> Merge:
    shard_gib = SHARD_BYTES / GIB if args.shard_gib is None else args.shard_gib
    if not shard_gib > 0:
        raise RecipeError(f"--shard-gib {shard_gib}: should be more than 0")
    rows = Merge.rows if args.audit_rows is None else args.audit_rows
    return Merge(DTYPES[args.dtype or "fp16"], args.onto, rows, args.most_kl, int(shard_gib * GIB))


def require_push(repository: str | None, is_public: bool, is_dry: bool) -> None:
    """Raise RecipeError if what is said of sending does not go together."""
    if repository is not None:
        require_repository(repository)
    elif is_public or is_dry:
        raise RecipeError(f"--{'public' if is_public else 'dry-run'}: says how something is sent; add --push ORG/NAME")


def require_newer(out: Path, run: RunFolder) -> None:
    """Raise RunError if the export in ``out`` was written before ``run`` was finished, so from another training."""
    manifest = out / MANIFEST
    if manifest.is_file() and manifest.stat().st_mtime < (run.path / "result.json").stat().st_mtime:
        raise RunError(f'"{out}" is older than the end of the run in "{run.path}"; write it anew with --force')


def push(parcel: Parcel, is_dry: bool) -> None:
    """Send ``parcel``, or say what would be sent."""
    for line in parcel.lines():
        print(printable(line))
    if is_dry:
        print("Nothing was sent (--dry-run).")
    else:
        print(f"sent: {send(parcel)}")


def export(
    run: str | os.PathLike[str] | None = None,
    *,
    merge: Literal["fp16", "bf16", "fp32"] | Merge | None = None,
    gguf: str | None = None,
    adapter: Literal["peft", "gguf"] | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> "Export":
    """Write what ``run`` has trained, in one of three forms, and return where it is and how it was checked.

    run: what ``train`` has returned, or a run folder; by default the newest finished one under runs/.
    merge: a Hugging Face model folder, its weights in that type; a ``Merge`` says more: over which weights, how it is audited.
    gguf: merged and quantised as one GGUF file, with Ollama's Modelfile: f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0. A ``Merge`` beside it
        says more, as above.
    adapter: the adapter alone, as PEFT's two files or as a GGUF file.
    out: the folder to write, by default inside the run's; ``force`` replaces one that an export wrote.
    device: where to merge: "auto", "cpu", "cuda", "cuda:1".

    Raises:
        QliteError: there is no such run or type, the folder exists, the disk does not take it, or what was merged does not answer as the
            run does; nothing is written then.
    """
    with called():
        if (gguf is not None or merge is not None) == (adapter is not None) or (gguf is not None and isinstance(merge, str)):
            raise RecipeError('export: give one of merge="fp16", gguf="q8_0" and adapter="peft": it says what to write')
        how, as_type = _merge(merge), None if gguf is None else gguf_type(gguf)
        if adapter not in (None, "peft", "gguf"):
            raise RecipeError(f'adapter = "{adapter}": should be "peft" or "gguf"')
        own = find_run(run)
        folder = own.path / _folder_name(how, as_type, adapter) if out is None else Path(out)
        if folder.exists() and not force:
            raise RunError(f'"{folder}" exists already; choose another --out, or replace it with --force')
        console = console_for(f"qlite export  {own.path}", quiet)
        if as_type:
            return _merge_to_gguf(own, folder, as_type, how or Merge(), device, console)
        if how:
            return _write_merged(own, folder, how, device, console)
        return _copy_adapter_files(own, folder) if adapter == "peft" else _write_adapter_as_gguf(own, folder, device, console)


@dataclass(frozen=True, repr=False)
class Export(Shown):
    """What an export has written. It is a path, too: that of its folder."""

    folder: Path
    what: str
    """In words."""
    size_bytes: int
    """Of its weights."""
    file: Path | None = None
    """The GGUF file; None: it is none."""
    audit: Audit | None = None
    """How the merged weights answer beside the run; None: nothing was merged."""

    def lines(self) -> list[str]:
        """Return all of it in words."""
        return [f"wrote {self.file or self.folder}: {self.what}", *(audit_lines(self.audit) if self.audit else ())]

    def __fspath__(self) -> str:
        return str(self.folder)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines():
            yield Text(line)


def _merge(given: str | Merge | None) -> Merge | None:
    if given is None or isinstance(given, Merge):
        return given
    if given not in DTYPES:
        raise RecipeError(f'merge = "{given}": should be one of {", ".join(DTYPES)}, or a Merge')
    return Merge(DTYPES[given])


def _folder_name(how: Merge | None, as_type: GgufType | None, adapter: str | None) -> str:
    if as_type:
        return f"gguf-{as_type.name}"
    if how:
        return f"merged-{_dtype_name(how)}"
    return "gguf-adapter" if adapter == "gguf" else "peft"


def _dtype_name(how: Merge) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == how.dtype)


def _write_merged(run: RunFolder, out: Path, how: Merge, device: str, console: RunConsole) -> Export:
    """Write ``run``'s model, its adapter merged into the base, into ``out``."""
    with console:
        try:
            with _without_circles(run):
                audit = write_audited(_opened(run, device, console), out, how, console)
        except (Stopped, KeyboardInterrupt) as stopped:
            stopped.add_note("the same command goes on where it was")
            raise
        _renew_report(run, out, console)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    what = f"{format_bytes(size)} of {str(how.dtype)[6:]} weights{_over(run, audit)}"
    return Export(out, what, size, audit=audit)


@contextmanager
def _without_circles(run: RunFolder) -> Iterator[None]:
    """Let what says that ``run`` cannot be merged say in which form there is one."""
    try:
        yield
    except NotMergeable as error:
        raise NotMergeable(f"{error}; {_way_as_adapter(run)}") from error


def _way_as_adapter(run: RunFolder) -> str:
    return "--adapter writes it as PEFT's files" if run.is_known_to_peft else QLITES_OWN


def _over(run: RunFolder, audit: Audit) -> str:
    return "" if run.recipe().method.trains_base else f", merged over the {audit.onto} base weights"


def audit_lines(audit: Audit) -> list[str]:
    """Return how the merged weights answer beside the run, and what is left of training."""
    lines = [
        f"{'written:  ' if onto == audit.onto else '          '}over the {onto} weights  "
        f"KL {each.kl:.2e} nats a token, likeliest token the same {each.top1:.1%}, "
        f"loss {each.loss:.4f} (run {each.live_loss:.4f}), greedy answers the same {each.same_answers} of {each.answers}"
        for onto, each in audit.found.items()
    ]
    if audit.left is not None:
        lines.append(f"what training changed (KL of run and base {audit.base.kl:.2e}): {audit.left:.1%} of it is left")
    return [*lines, *([advice] if (advice := audit.advice()) else ())]


def _merge_to_gguf(run: RunFolder, out: Path, as_type: GgufType, how: Merge, device: str, console: RunConsole) -> Export:
    """Write ``run``'s model, its adapter merged into the base, into the folder ``out`` as one GGUF file."""
    file = f"{run.path.resolve().name}-{as_type.name}.gguf"
    with console, _without_circles(run):
        audit = write_audited_gguf(_opened(run, device, console), out, file, as_type, how, console)
        _renew_report(run, out, console)
    size = (out / file).stat().st_size
    return Export(out, f"{format_bytes(size)}{_over(run, audit)}", size, out / file, audit)


def _write_adapter_as_gguf(run: RunFolder, out: Path, device: str, console: RunConsole) -> Export:
    """Write ``run``'s adapter into the folder ``out`` as one GGUF file."""
    name, method = run.path.resolve().name, run.recipe().method
    if not hasattr(method, "alpha"):
        way = "--gguf f16 merges it" if method.is_mergeable else _way_as_adapter(run)
        raise ExportError(f"llama.cpp's adapters are LoRA's, and this run has trained by {method.words}; {way}")
    file = f"{name}-lora.gguf"
    with console, new_folder(out) as folder:
        opened = _opened(run, device, console)
        source = sha256(run.adapter / WEIGHTS)
        size = write_adapter_gguf(folder / file, opened.base, method.alpha, name, console.phase, source)
        if (text := run_modelfile(opened, file, is_adapter=True)) is not None:
            write_text(folder / "Modelfile", text)
        write_text(folder / "README.md", run_card(run, GGUF_ADAPTER, {"weights": "F32"}, {}))
    return Export(out, f"{format_bytes(size)}, the adapter alone", size, out / file)


def _renew_report(run: RunFolder, out: Path, console: Observer) -> None:
    """Let the run's report tell of the export, where that is in the run's folder."""
    if out.resolve().parent == run.path.resolve():
        leave_report(run, console.note)


def _opened(run: RunFolder, device: str, console: Observer) -> OpenRun:
    # Weights that a card cannot hold are merged where they lie.
    opened = open_run(run, "cpu" if run.recipe().memory.base == "host" else device, console.phase, console.note)
    opened.attach()
    return opened


def _copy_adapter_files(run: RunFolder, out: Path) -> Export:
    """Write ``run``'s adapter as PEFT reads it into ``out``, with the tokenizer where tokens or template are not the base's.

    Raises:
        ExportError: PEFT has no such method.
    """
    recipe = run.recipe()
    source = run.peft_adapter
    if not run.is_known_to_peft:
        held = f"the run's own tensors are in {run.adapter / WEIGHTS}"
        way = "--merge writes it into the base's weights" if recipe.method.is_mergeable else QLITES_OWN
        raise ExportError(f"PEFT has no adapter of this kind ({recipe.method.words}); {held}; {way}")
    with new_folder(out) as folder:
        write_tensors(folder / WEIGHTS, read_tensors(source), read_metadata(source))
        config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        # PEFT's own reader of it asks for the base by name; where it lies on this machine is nobody else's.
        write_json(folder / CONFIG, {**config, "base_model_name_or_path": local_name(config["base_model_name_or_path"])})
        write_text(folder / "README.md", run_card(run, ADAPTER, {}, {}))
        if recipe.data.template != "auto" or (isinstance(recipe.method, LoRA) and recipe.method.new_tokens):
            tokenizer = recipe.base.tokenizer(lambda *_: None)
            recipe.method.resolved(tokenizer)
            tokenizer.chat_template = run.template or tokenizer.chat_template
            write_company(folder, tokenizer, None)
    return Export(out, f"load it with peft.PeftModel.from_pretrained(base, {str(out)!r})", (out / WEIGHTS).stat().st_size)


let_call(__name__, export)

if __name__ == "__main__":
    run_verb(main)
