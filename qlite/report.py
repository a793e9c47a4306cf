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
from qlite.verb import let_call, run_verb


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qlite.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", help="run folders; by default the newest finished one under runs/")
    parser.add_argument("--out", type=Path, help="the file to write; an earlier page of qlite's is written over, nothing else")
    args = parser.parse_args(argv)
    print(report(*args.runs, out=args.out))


def report(*runs: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page on a run, or on several over each other, and return its path.

    runs: what ``train`` has returned, or run folders, finished or not; none: the newest finished one under runs/.
    out: the .html file to write; by default report.html in the run's folder, of several compare.html in the one they have in common.

    Raises:
        QliteError: there is no such run, a file of somebody else's is there, or the disk does not take it.
    """
    # Imported only now: torch and transformers take seconds, and neither --help nor a mistyped option needs them.
    from qlite.reporting.overlay import LOOKS, overlay
    from qlite.training.run_folder import RunFolder, find_run
    from qlite.training.run_report import tell, write_page, write_report

    page = None if out is None else Path(out)
    if page is not None and page.suffix.lower() not in (".html", ".htm"):
        raise RunError(f'--out "{page}": a report is an .html file')
    if not runs:
        return write_report(find_run(None), page)
    folders = [Path(name) for name in runs]
    for folder in folders:
        if not RunFolder(folder).is_begun:
            raise RunError(f'"{folder}" is no run folder: it has no recipe.toml and run.json')
    if len(folders) == 1:
        return write_report(RunFolder(folders[0]), page)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RunError("the same run is named twice; name runs that differ, or one alone for its own report")
    if len(folders) > len(LOOKS):
        raise RunError(f"{len(folders)} runs: more than {len(LOOKS)} cannot be told apart in one figure; name fewer")
    return write_page(page or common_folder(folders) / "compare.html", overlay([tell(RunFolder(folder)) for folder in folders]))


def common_folder(folders: list[Path]) -> Path:
    """Return the folder that holds all ``folders``. Raises RunError if there is none: on Windows they may lie on several drives."""
    try:
        return Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    except ValueError as error:
        raise RunError("the runs have no folder in common; say where the page goes: --out FILE") from error


let_call(__name__, report)

if __name__ == "__main__":
    run_verb(main)
