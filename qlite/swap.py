"""Swap the adapter in merged weights: take one out of a merged folder, put another in, or do only one of the two.

python -m qlite.swap runs/a/merged-fp16 --remove runs/a --add runs/b --out merged-b
python -m qlite.swap runs/a/merged-fp16 --remove runs/a --out base-again
python -m qlite.swap runs/a/merged-fp16 --add runs/b --out both

The base is not needed; an adapter is a finished run or a folder in PEFT's format. Whether the one is in the weights and the other is not
is looked up in the folder's own records, and in the weights themselves. What the first merge has rounded away does not come back, and
each swap rounds once more: many in a row leave nothing of it in 16 bit (in weights of export --merge --dtype fp32 they do no harm). Where
the base is at hand, python -m qlite.export --merge runs/b is exact; to try adapters out, python -m qlite.chat --adapter swaps them beside
the base.
"""

import argparse
from functools import partial
from pathlib import Path

from transformers import GenerationConfig

from qlite.data.encode import Encoder
from qlite.errors import AdapterError, QliteError, RecipeError, RunError
from qlite.formats.merged import ended_by
from qlite.formats.swapped import Holdings, MergedFolder, Presence, Updates, presence
from qlite.model.checkpoint import SafetensorsCheckpoint
from qlite.model.source import ModelFiles
from qlite.recipe.share import local_name
from qlite.serving.bank import misfits
from qlite.training.adapter_folders import BASE_KEYS, Given, contradictions, read_updates, run_at
from qlite.training.console import open_console
from qlite.verb import run_verb


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m qlite.swap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("merged", type=Path, help="folder of merged weights, as export --merge writes them")
    parser.add_argument("--remove", metavar="FOLDER", help="the adapter to take out")
    parser.add_argument("--add", metavar="FOLDER", help="the adapter to put in")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    args = parser.parse_args(argv)
    if args.remove is None and args.add is None:
        raise RecipeError("nothing to do: name an adapter to --remove, one to --add, or both")
    if args.out.exists() and not args.force:
        raise RunError(f'"{args.out}" exists already; choose another --out, or replace it with --force')
    merged, old, new, given = read_all(args.merged, args.remove, args.add)
    hashes = {option: each.sha256 for option, each in given.items()}
    before = require_presence(merged, old, new, hashes)
    tokenizer, generation = merged.checkpoint.tokenizer(), merged.checkpoint.generation_config()
    added = given.get("--add")
    if added is not None and added.run and added.run.template is not None:
        tokenizer.chat_template = added.run.template  # what the adapter was trained with
        generation = generation or GenerationConfig.from_model_config(merged.checkpoint.config())
        generation = ended_by(generation, Encoder(tokenizer, added.run.template, "answers").stop_ids)
    shares, swaps = {option: each.share for option, each in before.items()}, merged.swaps() + 1
    after = merged.holdings().after(hashes.get("--remove"), hashes.get("--add"))
    # The folder may go to others: no folder of this machine.
    named = {"from": str(args.merged), "removed": args.remove, "added": args.add}
    record = {key: value and local_name(value) for key, value in named.items()} | {"shares_before": shares, "swaps": swaps}
    record |= {"holds": list(after.hashes), "holds_all": after.is_all}
    with open_console(f"qlite swap  {args.merged}") as console:
        merged.write_swapped(args.out, old, new, tokenizer, generation, record, partial(console.phase, "swap"))
    for option, each in before.items():
        told = f"{each.share:.3f} of it was in the weights (up to {each.noise:.3f} of that by chance)"
        print(f"{option[2:]}: {given[option].path}; {told}")
    print(f"wrote {args.out}: {len(old.keys() | new.keys())} linears changed; swaps since the merge: {swaps}, each rounds once more")
    if added is not None and added.run:
        print(f"without the rounding of the merge before:  python -m qlite.export --merge {added.path}")


def read_all(folder: Path, remove: str | None, add: str | None) -> tuple[MergedFolder, Updates, Updates, dict[str, Given]]:
    """Return the merged folder, what is to be taken out and put in, and both adapters by their option.

    Raises:
        QliteError: for all that is wrong with them at once.
    """
    problems: list[str] = []
    given, updates = {}, {"--remove": {}, "--add": {}}
    for option, text in (("--remove", remove), ("--add", add)):
        if text is not None:
            try:
                given[option] = Given(option, Path(text), run_at(Path(text)))
                updates[option] = read_updates(given[option], problems)
            except QliteError as error:
                problems.append(f"{option}: {error}")
    merged = None
    try:
        if not folder.is_dir():
            raise RunError(f'there is no folder "{folder}"')
        merged = MergedFolder(SafetensorsCheckpoint(ModelFiles(folder, None, str(folder))))
    except QliteError as error:
        problems.append(str(error))
    for option, each in given.items():
        if any(update.lengths is not None for update in updates[option].values()):
            problems.append(f"{option}: {each.path} is DoRA: merged, its rows have lost their own lengths; merge over the base instead")
        problems += [f"{option}: {problem}" for problem in (misfits(updates[option], merged.shapes()) if merged else [])]
    problems += contradictions(list(given.values()), BASE_KEYS)
    if problems:
        raise AdapterError("\n".join(problems))
    return merged, updates["--remove"], updates["--add"], given


def require_presence(merged: MergedFolder, old: Updates, new: Updates, hashes: dict[str, str]) -> dict[str, Presence]:
    """Return how much of what is taken out, and of what is put in, is in the weights, by option.

    ``hashes``: those of both adapters' files. Where the folder's records name adapters, that decides; else the weights do.

    Raises:
        AdapterError: what is to be taken out is not in them, or what is to be put in is already; as good as surely.
    """
    found: dict[str, Presence] = {}
    holdings = merged.holdings()
    if old:
        its = found["--remove"] = presence(merged.read, old, {})
        if hashes["--remove"] not in holdings.hashes and (holdings.is_all or its.is_out):
            told = "they may hold it under another name" if its.is_in else "it was not merged into them"
            raise AdapterError(f"--remove: {_seen(its)}: {told}{_named_instead(holdings)}")
    if new:
        its = found["--add"] = presence(merged.read, new, old)
        if hashes["--add"] in holdings.after(hashes.get("--remove"), None).hashes or its.is_in:
            raise AdapterError(f"--add: {_seen(its)}: it is in them already; --remove it, or leave it in")
    return found


def _seen(found: Presence) -> str:
    told = f"the weights hold {found.share:.3f} of that adapter"
    return f"{told}, and what a merge of it leaves in {found.as_merged} of {found.linears} linears"


def _named_instead(holdings: Holdings) -> str:
    if not holdings.is_all:
        return ", or not as it is"
    named = ", ".join(f"SHA-256 {each[:12]}" for each in holdings.hashes) or "none"
    return f"; their folder's record names the adapters in them ({named}), and this is another file: give the run's folder, if it is of one"


if __name__ == "__main__":
    run_verb(main)
