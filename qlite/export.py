"""Write what a run has trained: merged 16-bit weights, the adapter as PEFT's two files, or either as one GGUF file.

python -m qlite.export --merge                     newest finished run, fp16
python -m qlite.export --merge runs/mine --dtype bf16 --out exports/mine
python -m qlite.export --merge --onto original     over the base's own weights; by default over those that answer more like the run
python -m qlite.export --adapter runs/mine
python -m qlite.export --gguf q8_0                 merged, for llama.cpp and Ollama: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0
python -m qlite.export --gguf-adapter              the adapter alone, for llama.cpp's --lora
"""

import argparse
from pathlib import Path

import torch

from qlite.errors import ExportError, RecipeError, RunError
from qlite.files import new_folder, write_tensors, write_text
from qlite.formats.gguf_lora import write_adapter_gguf
from qlite.formats.gguf_merged import write_merged_gguf
from qlite.formats.gguf_types import GgufType, gguf_type
from qlite.formats.merged import SHARD_BYTES, write_company
from qlite.formats.peft import CONFIG, WEIGHTS, read_tensors
from qlite.model.wheel import Progress
from qlite.training.console import open_console
from qlite.training.gguf_facts import run_modelfile, run_saying
from qlite.training.merging import Audit, Merge, write_audited
from qlite.training.open_run import OpenRun, open_run
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
    args = parser.parse_args(argv)
    if not args.shard_gib > 0:
        raise RecipeError(f"--shard-gib {args.shard_gib}: should be more than 0")
    if args.audit_rows < 0 or not args.most_kl > 0:
        raise RecipeError(f"--audit-rows {args.audit_rows}, --most-kl {args.most_kl}: should be 0 or more, and more than 0")
    as_type = gguf_type(args.gguf) if args.gguf else None
    run = find_run(args.run)
    out = args.out or run.path / _folder_name(args)
    if out.exists() and not args.force:
        raise RunError(f'"{out}" exists already; choose another --out, or replace it with --force')
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
    what = f"merged over the dequantised {opened.recipe.base.bits}-bit base" if as_type else "the adapter alone"
    print(f"wrote {out / file}: {format_bytes(size)}, {what}")


def _opened(run: RunFolder, device: str, progress: Progress) -> OpenRun:
    # Weights that a card cannot hold are merged where they lie.
    opened = open_run(run, "cpu" if run.recipe().memory.base == "host" else device, progress)
    opened.attach()
    return opened


def copy_adapter_files(run: RunFolder, out: Path) -> None:
    """Write ``run``'s adapter as PEFT reads it into ``out``, with the tokenizer where that has tokens of the run's own.

    Raises:
        ExportError: PEFT has no such method.
    """
    if not (run.adapter / CONFIG).is_file():
        raise ExportError(f"PEFT has no adapter type for this method; {run.adapter / WEIGHTS} holds the tensors")
    recipe = run.recipe()
    with new_folder(out) as folder:
        write_tensors(folder / WEIGHTS, read_tensors(run.adapter))
        write_text(folder / CONFIG, (run.adapter / CONFIG).read_text(encoding="utf-8"))
        if recipe.method.new_tokens:
            tokenizer = recipe.base.tokenizer(lambda *_: None)
            recipe.method.resolved(tokenizer)
            tokenizer.chat_template = run.template or tokenizer.chat_template
            write_company(folder, tokenizer, None)


if __name__ == "__main__":
    run_verb(main)
