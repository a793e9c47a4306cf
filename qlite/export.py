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
from pathlib import Path

import torch

from qlite.errors import ExportError, RecipeError, RunError, printable
from qlite.files import MANIFEST, new_folder, write_json, write_tensors, write_text
from qlite.formats.card import ADAPTER, GGUF, GGUF_ADAPTER
from qlite.formats.gguf_lora import write_adapter_gguf
from qlite.formats.gguf_merged import write_merged_gguf
from qlite.formats.gguf_types import GgufType, gguf_type
from qlite.formats.merged import SHARD_BYTES
from qlite.formats.peft import CONFIG, WEIGHTS, read_tensors
from qlite.model.wheel import Progress
from qlite.recipe.share import local_name
from qlite.training.cards import run_card
from qlite.training.console import open_console
from qlite.training.gguf_facts import run_modelfile, run_saying
from qlite.training.merging import Audit, Merge, write_audited
from qlite.training.open_run import OpenRun, open_run
from qlite.training.pushing import pack, require_repository, send
from qlite.training.run_folder import RunFolder, find_run
from qlite.units import GIB, format_bytes
from qlite.verb import run_verb

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qlite.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help="run folder; without it the newest finished one under runs/")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--merge", action="store_true", help="dequantise, merge, write a Hugging Face model folder")
    what.add_argument("--adapter", action="store_true", help="write PEFT's adapter_config.json and adapter_model.safetensors")
    what.add_argument("--gguf", metavar="TYPE", help="merge, quantise to TYPE, write one GGUF file and Ollama's Modelfile")
    what.add_argument("--gguf-adapter", action="store_true", help="write the adapter as a GGUF file")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the merged weights")
    parser.add_argument("--out", type=Path, help="folder to write; by default inside the run's")
    parser.add_argument(
        "--onto", choices=("dequantised", "original"), help="what to merge over; by default whichever answers more like the run"
    )
    parser.add_argument("--audit-rows", type=int, default=Merge.rows, help="held-out rows on which merged model and run are compared")
    parser.add_argument("--most-kl", type=float, default=Merge.most_kl, help="nats a token between both beyond which nothing is written")
    parser.add_argument("--shard-gib", type=float, default=SHARD_BYTES / GIB, help="largest weight file")
    parser.add_argument("--device", default="auto", help="where to merge: auto, cpu, cuda, cuda:1")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    parser.add_argument(
        "--push", metavar="ORG/NAME", help="send the folder to this repository of the Hugging Face hub; one that exists as it is"
    )
    parser.add_argument("--public", action="store_true", help="with --push: a new repository can be read by anybody, not by you alone")
    parser.add_argument("--dry-run", action="store_true", help="with --push: say what would be sent, and send nothing")
    args = parser.parse_args(argv)
    require_push(args.push, args.public, args.dry_run)
    if not args.shard_gib > 0:
        raise RecipeError(f"--shard-gib {args.shard_gib}: should be more than 0")
    if args.audit_rows < 0 or not args.most_kl > 0:
        raise RecipeError(f"--audit-rows {args.audit_rows}, --most-kl {args.most_kl}: should be 0 or more, and more than 0")
    as_type = gguf_type(args.gguf) if args.gguf else None
    run = find_run(args.run)
    out = args.out or run.path / _folder_name(args)
    if not out.exists() or args.force:
        write(run, out, args, as_type)
    elif not args.push:
        raise RunError(f'"{out}" exists already; choose another --out, or replace it with --force')
    else:
        require_newer(out, run)
    if args.push:
        push(run, out, args.push, args.public, args.dry_run)


def require_push(repository: str | None, is_public: bool, is_dry: bool) -> None:
    """Raise RecipeError if what is said of sending does not go together."""
    if repository is not None:
        require_repository(repository)
    elif is_public or is_dry:
        raise RecipeError(f"--{'public' if is_public else 'dry-run'}: says how something is sent; add --push ORG/NAME")


def write(run: RunFolder, out: Path, args: argparse.Namespace, as_type: GgufType | None) -> None:
    """Write the export that ``args`` ask for into ``out``."""
    if args.merge:
        how = Merge(DTYPES[args.dtype], args.onto, args.audit_rows, args.most_kl, int(args.shard_gib * GIB))
        merge(run, out, how, args.device)
        print(f"\nNext:  python -c \"from transformers import pipeline; print(pipeline('text-generation', '{out}'))\"")
    elif as_type:
        write_run_gguf(run, out, as_type, args.device)
    elif args.gguf_adapter:
        write_run_gguf(run, out, None, args.device)
    else:
        copy_adapter_files(run, out)
        print(f"wrote {out}: load it with peft.PeftModel.from_pretrained(base, {str(out)!r})")


def require_newer(out: Path, run: RunFolder) -> None:
    """Raise RunError if the export in ``out`` was written before ``run`` was finished, so from another training."""
    manifest = out / MANIFEST
    if manifest.is_file() and manifest.stat().st_mtime < (run.path / "result.json").stat().st_mtime:
        raise RunError(f'"{out}" is older than the end of the run in "{run.path}"; write it anew with --force')


def push(run: RunFolder, out: Path, repository: str, is_public: bool, is_dry: bool) -> None:
    """Send the export in ``out`` to ``repository``, or say what would be sent."""
    parcel = pack(out, run.recipe(), repository, is_public)
    for line in parcel.lines():
        print(printable(line))
    if is_dry:
        print("Nothing was sent (--dry-run).")
    else:
        print(f"sent: {send(parcel)}")


def _folder_name(args: argparse.Namespace) -> str:
    if args.merge:
        return f"merged-{args.dtype}"
    return f"gguf-{args.gguf.lower()}" if args.gguf else "gguf-adapter" if args.gguf_adapter else "peft"


def merge(run: RunFolder, out: Path, how: Merge, device: str) -> None:
    """Write ``run``'s model, its adapter merged into the base, into ``out``, and say how it was checked."""
    with open_console(f"qlite export  {run.path}") as console:
        audit = write_audited(_opened(run, device, console.phase), out, how, console)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"wrote {out}: {format_bytes(size)} of {str(how.dtype)[6:]} weights, merged over the {audit.onto} base weights")
    print_audit(audit)


def print_audit(audit: Audit) -> None:
    """Say how the merged weights answer beside the run."""
    for onto, each in audit.found.items():
        mark = "written:  " if onto == audit.onto else "          "
        print(
            f"{mark}over the {onto} weights  KL {each.kl:.2e} nats a token, likeliest token the same {each.top1:.1%}, "
            f"loss {each.loss:.4f} (run {each.live_loss:.4f}), greedy answers the same {each.same_answers} of {each.answers}"
        )


def write_run_gguf(run: RunFolder, out: Path, as_type: GgufType | None, device: str) -> None:
    """Write ``run``'s model, merged and stored as ``as_type``, or without a type its adapter, into the folder ``out`` as one GGUF file."""
    name = run.path.resolve().name
    file = f"{name}-{as_type.name}.gguf" if as_type else f"{name}-lora.gguf"
    with open_console(f"qlite export  {run.path}") as console, new_folder(out) as folder:
        opened = _opened(run, device, console.phase)
        if as_type:
            size = write_merged_gguf(folder / file, opened.base, run_saying(opened, name), as_type, console.phase)
        else:
            size = write_adapter_gguf(folder / file, opened.base, opened.recipe.method.alpha, name, console.phase)
        if (text := run_modelfile(opened, file, is_adapter=as_type is None)) is not None:
            write_text(folder / "Modelfile", text)
        write_text(
            folder / "README.md", run_card(run, GGUF if as_type else GGUF_ADAPTER, {"weights": as_type.name if as_type else "F32"}, {})
        )
    what = f"merged over the dequantised {opened.recipe.base.bits}-bit base" if as_type else "the adapter alone"
    print(f"wrote {out / file}: {format_bytes(size)}, {what}")


def _opened(run: RunFolder, device: str, progress: Progress) -> OpenRun:
    # Weights that a card cannot hold are merged where they lie.
    opened = open_run(run, "cpu" if run.recipe().memory.base == "host" else device, progress)
    opened.attach()
    return opened


def copy_adapter_files(run: RunFolder, out: Path) -> None:
    """Write ``run``'s adapter as PEFT reads it into ``out``. Raises ExportError where PEFT has no such method."""
    if not (run.adapter / CONFIG).is_file():
        raise ExportError(f"PEFT has no adapter type for this method; {run.adapter / WEIGHTS} holds the tensors")
    with new_folder(out) as folder:
        write_tensors(folder / WEIGHTS, read_tensors(run.adapter))
        config = json.loads((run.adapter / CONFIG).read_text(encoding="utf-8"))
        # PEFT's own reader of it asks for the base by name; where it lies on this machine is nobody else's.
        write_json(folder / CONFIG, {**config, "base_model_name_or_path": local_name(config["base_model_name_or_path"])})
        write_text(folder / "README.md", run_card(run, ADAPTER, {}, {}))


if __name__ == "__main__":
    run_verb(main)
