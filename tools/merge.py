"""Merge any adapter of PEFT's that is LoRA, AdaLoRA or (IA)^3 into any base model and write fp16 weights.

    python tools/merge.py ADAPTER_FOLDER --base org/name --out merged
    python tools/merge.py ADAPTER_FOLDER --base ./model.gguf --bits 4 --dtype bf16 --out merged

The same functions as ``python -m qlite.export --merge``, for adapters that qlite did not train. ``--bits 4`` merges over
the weights that a 4-bit run trained against; 16 (the default) over the original ones. The tokenizer that is written is the
adapter's, where its folder has one, else the base's with the new tokens that an adapter of qlite's names.
"""

import argparse
from pathlib import Path

import torch

from qlite.errors import ExportError
from qlite.export import DTYPES
from qlite.formats.foreign import read_foreign_adapter
from qlite.formats.foreign_fit import adapter_tokenizer, put_foreign_adapter
from qlite.formats.merged import write_merged
from qlite.model.load import Base
from qlite.training.console import open_console
from qlite.training.provenance import add_new_tokens, other_base, other_company
from qlite.verb import run_verb


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="folder with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("--base", required=True, help="folder, hub id, .gguf file or pypi: source, as base.model in a recipe")
    parser.add_argument("--revision", help="of a hub model")
    parser.add_argument("--sha256", help="of a .gguf file")
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=16, help="storage of the base to merge over")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the merged weights")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.force:
        raise ExportError(f'"{args.out}" exists already; choose another --out, or replace it with --force')
    foreign = read_foreign_adapter(args.adapter)
    with open_console(f"merge  {args.adapter}  into  {args.base}") as console:
        # float32: bfloat16 would round a float16 or float32 base before it is merged.
        base = Base(model=args.base, revision=args.revision, sha256=args.sha256, bits=args.bits, dtype="float32")
        loaded = base.load(torch.device("cpu"), console.phase)
        if other := other_base(args.adapter, loaded):
            console.note(f"the adapter was trained over another base: {other}")
        put_foreign_adapter(foreign, loaded.model, args.adapter)
        tokenizer = adapter_tokenizer(args.adapter, loaded.model)
        if tokenizer is None:
            tokenizer = loaded.tokenizer
            add_new_tokens(args.adapter, tokenizer)
        for other in other_company(args.adapter, loaded, tokenizer):
            console.note(other)
        write_merged(args.out, loaded.model, tokenizer, loaded.generation_config, DTYPES[args.dtype], console.phase)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_verb(main)
