"""Which methods obey the contract over which storage: a grid of laws kept, and each gap with its reason.

    python tools/methods_grid.py                  # runs tests/methods/test_contract.py, some minutes
    python tools/methods_grid.py --quick          # without 8 bit and the variants that differ by their keys alone

A cell says how many laws hold; "-" and a reason: the method refuses that storage, and the refusal is tested. Exit code 4 if a law fails.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from qlite.errors import ExportError, MachineError
from qlite.verb import run_verb

ROOT = Path(__file__).parents[1]
LAWS = "tests/methods/test_contract.py"
CASE = re.compile(r"\[(?P<name>.+)-(?P<storage>\d+ bit)\]$")
STORAGES = ("16 bit", "8 bit", "4 bit")


def main(argv: list[str]) -> None:
    """Print the grid; exit 4 if a law fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave 8 bit and some variants out")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "laws.xml"
        command = [sys.executable, "-m", "pytest", LAWS, f"--junitxml={report}", *([] if args.quick else ["-m", "slow or not slow"])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.exists():
            raise MachineError(f"pytest ended with exit code {done.returncode}: {done.stdout[-500:]}")
        failed = print_grid(report)
    if failed:
        raise ExportError(f"{len(failed)} laws are broken: {', '.join(failed[:5])}")


def print_grid(report: Path) -> list[str]:
    """Print the grid of a pytest report and return the laws that failed."""
    kept: Counter[tuple[str, str]] = Counter()
    reasons: dict[tuple[str, str], set[str]] = {}
    names, failed = [], []
    for case in ElementTree.parse(report).iter("testcase"):
        found = CASE.search(case.get("name", ""))
        if found is None:
            continue
        cell = found["name"], found["storage"]
        names.append(cell[0])
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(case.get("name", ""))
        elif skipped is not None:
            reasons.setdefault(cell, set()).add(skipped.get("message", ""))
        else:
            kept[cell] += 1
    width = max(map(len, names))
    print(f"{'':{width}}  {'  '.join(f'{storage:>6}' for storage in STORAGES)}")
    for name in dict.fromkeys(names):
        cells = [str(kept[name, storage]) if kept[name, storage] else "-" for storage in STORAGES]
        why = {reason for storage in STORAGES for reason in reasons.get((name, storage), ())}
        print(f"{name:{width}}  {'  '.join(f'{cell:>6}' for cell in cells)}  {'; '.join(sorted(why))}".rstrip())
    print(f"\n{sum(kept.values())} laws hold, {len(failed)} are broken")
    return failed


if __name__ == "__main__":
    run_verb(main)
