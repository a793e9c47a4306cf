"""Write a run's report, one HTML file to look at; of several runs, one page with their curves over each other.

python -m qlite.report                              the newest finished run: report.html in its folder
python -m qlite.report runs/mine                    this one, finished or not
python -m qlite.report runs/a runs/b runs/c         compare.html in the folder that they have in common
python -m qlite.report runs/a runs/b --out ab.html  or where you want it
"""

import argparse
import os
from pathlib import Path

from qlite.errors import RunError
from qlite.verb import run_verb


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qlite.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", help="run folders; by default the newest finished one under runs/")
    parser.add_argument("--out", type=Path, help="the file to write; an earlier page of qlite's is written over, nothing else")
    args = parser.parse_args(argv)
    # Imported only now: torch and transformers take seconds, and neither --help nor a mistyped option needs them.
    from qlite.reporting.overlay import LOOKS, overlay
    from qlite.training.run_folder import RunFolder, find_run
    from qlite.training.run_report import tell, write_page, write_report

    if args.out is not None and args.out.suffix.lower() not in (".html", ".htm"):
        raise RunError(f'--out "{args.out}": a report is an .html file')
    if not args.runs:
        print(write_report(find_run(None), args.out))
        return
    folders = [Path(name) for name in args.runs]
    for folder in folders:
        if not RunFolder(folder).is_begun:
            raise RunError(f'"{folder}" is no run folder: it has no recipe.toml and run.json')
    if len(folders) == 1:
        print(write_report(RunFolder(folders[0]), args.out))
        return
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RunError("the same run is named twice; name runs that differ, or one alone for its own report")
    if len(folders) > len(LOOKS):
        raise RunError(f"{len(folders)} runs: more than {len(LOOKS)} cannot be told apart in one figure; name fewer")
    print(write_page(args.out or common_folder(folders) / "compare.html", overlay([tell(RunFolder(folder)) for folder in folders])))


def common_folder(folders: list[Path]) -> Path:
    """Return the folder that holds all ``folders``. Raises RunError if there is none: on Windows they may lie on several drives."""
    try:
        return Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    except ValueError as error:
        raise RunError("the runs have no folder in common; say where the page goes: --out FILE") from error


if __name__ == "__main__":
    run_verb(main)
