"""Speed beside other trainers, in one run: the same model, rows, rank, targets, batch and checkpointing, step for step in turns.

    python tools/bench.py --setup                      # the peers' environments, into build/bench (11 GB), and then everything
    python tools/bench.py --only counts,load           # needs no other environment, but: pip install peft accelerate
    python tools/bench.py --only small --dtype float32 --rounds 5
    python tools/bench.py --setup --device cuda --only small,large,7b --rounds 20

The parts:
  small    SmolLM2-135M, 4 x 512 tokens: qlite, PEFT + Trainer, PEFT + TRL, unsloth (and with UNSLOTH_CPU_COMPILE=1); twice: with the
           allocator settings that each side chooses, and with those that qlite chooses for all
  large    a random Llama of 1.1 billion weights, 1 x 512 and 2 x 1024: qlite and PEFT + Trainer (on a card: all of them)
  7b       on a card: a random Llama with the sizes of Llama 2 7B and SmolLM2's vocabulary, 1 x 2048 and 4 x 2048. All sides lie on the
           card together, 35 GiB and more; on a smaller card name one or two: --sides "qlite,unsloth"
  counts   kernels, bytes, FLOPs and dequantisations of one step of qlite and of PEFT + Trainer, and from them a roofline estimate for
           three cards (memory/work.py says how; an estimate, nothing was run on a card)
  load     the 1.1 billion weights quantised to NF4 in a fresh process: transformers, qlite, qlite from its cache
  ablation qlite with one part off at a time

Each side is a process of its own and holds what it needs all the time; only one works. A turn is two steps, and the second counts: while
others work the kernel, and on a virtual machine its host, take what a side has given back, and its first step pays for it. The first turn
warms up and does not count.
Figures are medians; "spread" is the lowest and the highest. "The products alone" are a step's, one after the other, in the same turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench_pieces import CARDS, LARGE, LLAMA7B, SMALL, places

from qlite.errors import MachineError, RecipeError
from qlite.verb import run_verb

HERE = Path(__file__).parent
RANK, ALPHA, LR = 8, 16, 1e-4
MIB = 2**20
STEPS_OF_A_TURN = 2
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
# What qlite tells glibc (device.keep_freed_memory) and torch (qlite/__init__.py) itself, as variables for those who do not.
RAISED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1), HUGE_PAGES: "1"}
ENVIRONMENTS = {
    "peft": ["peft==0.21.2", "trl==1.16.0", "accelerate==1.15.0", "transformers==5.23.0", "bitsandbytes==0.50.2", "datasets>=4"],
    "unsloth": ["unsloth==2026.10.9"],
}


@dataclass(frozen=True)
class Side:
    """One row of a table."""

    name: str
    runs: str
    """Its function in bench_sides.py."""
    environment: str | None = None
    """None: the one that runs this tool."""
    variables: dict[str, str] = field(default_factory=dict)
    keys: dict[str, object] = field(default_factory=dict)
    """Recipe keys of ours."""
    allocator: str = "own"


KEPT = Side("qlite, attention kept", "qlite", keys={"memory.checkpointing": "attention"})
AGAIN = Side("qlite, memory.checkpointing = elementwise", "qlite", keys={"memory.checkpointing": "elementwise"})
AUTO = Side("qlite, memory.checkpointing = auto, its default", "qlite", keys={"memory.checkpointing": "auto"})
QLITE, TRAINER = Side("qlite", "qlite"), Side("PEFT + Trainer", "trainer", "peft")
LIMIT = Side("the products alone", "limit", variables={HUGE_PAGES: "1"})
PEERS = [
    TRAINER,
    Side("PEFT + TRL", "trl", "peft"),
    Side("unsloth, CPU backend", "unsloth", "unsloth"),
    Side("unsloth, UNSLOTH_CPU_COMPILE=1", "unsloth", "unsloth", {"UNSLOTH_CPU_COMPILE": "1"}),
]
ON_A_CARD = [QLITE, KEPT, AGAIN, TRAINER, PEERS[1], Side("unsloth", "unsloth", "unsloth"), LIMIT]
ABLATION = [
    QLITE,
    KEPT,
    AGAIN,
    Side("nothing computed again (checkpointing = none)", "qlite", keys={"memory.checkpointing": "none"}),
    Side("norms, SwiGLU, rotary as written (base.fused = false)", "qlite", keys={"base.fused": False}),
    Side("all logits at once (loss_chunk = 2048)", "qlite", keys={"memory.loss_chunk": 2048}),
    Side("glibc's and torch's allocators untouched", "qlite", variables={HUGE_PAGES: "0"}, allocator="untouched"),
    Side("no huge pages", "qlite", variables={HUGE_PAGES: "0"}),
    Side("16-bit base", "qlite", keys={"base.bits": 16}),
]


@dataclass(frozen=True)
class Work:
    """What is trained."""

    model: str
    micro_batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.model}, {self.micro_batch} x {self.tokens} tokens"


def main(argv: list[str]) -> None:
    """Run the parts that are asked for and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="make the peers' environments first")
    parser.add_argument("--only", default=",".join(RUN), help="parts, with commas between them")
    parser.add_argument("--sides", default="", help="only sides whose names contain one of these words, with commas between them")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of all sides' arithmetic")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    args = parser.parse_args(argv)
    if not Path("/proc/self/status").is_file():
        raise MachineError("the memory of a process is read from /proc/self/status, which only Linux has")
    parts = args.only.split(",")
    if unknown := [part for part in parts if part not in RUN]:
        raise RecipeError(f'--only: there is no part "{unknown[0]}"; there are: {", ".join(RUN)}')
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.setup:
        set_up(args.out)
    wanted = [word for word in args.sides.split(",") if word]
    print(machine(args.device), flush=True)
    for part in parts:
        RUN[part](args, lambda sides: [side for side in sides if not wanted or any(word in side.name for word in wanted)])


def set_up(out: Path) -> None:
    """Make an environment for each peer, with the torch that runs here.

    unsloth takes PyPI's build (===) whatever else is at hand: its torchvision loads beside no other.
    """
    import torch

    for name, packages in ENVIRONMENTS.items():
        venv.create(out / name, with_pip=True, clear=True)
        version = f"{'===' if name == 'unsloth' else '=='}{torch.__version__.partition('+')[0]}"
        pip = [str(python_of(out, name)), "-m", "pip", "install", "-q", f"torch{version}", *packages]
        subprocess.run(pip, check=True)


def python_of(out: Path, environment: str | None) -> Path:
    return Path(sys.executable) if environment is None else out / environment / "bin" / "python"


def machine(where: str) -> str:
    """Return what runs here, in words. Where qlite multiplies bfloat16 "in float32", torch has only slow products of it for the others."""
    import torch

    from qlite import device

    capability = "" if where == "cuda" else f", {torch.backends.cpu.get_cpu_capability()}"
    return f"{device.describe(torch.device(where))}{capability}; torch {torch.__version__}"


# Steps in turns


def run_small(args, chosen) -> None:
    work = Work(SMALL, 4, 512)
    if args.device == "cuda":
        table(f"{work}", work, in_turns(work, chosen(ON_A_CARD), args), args)
        return
    for allocator, title in (("own", "each side's own allocator settings"), ("raised", "qlite's allocator settings for all")):
        sides = [QLITE, KEPT, AUTO, *(replace(side, allocator=allocator) for side in PEERS), LIMIT]
        table(f"{work}; {title}", work, in_turns(work, chosen(sides), args), args)


def run_large(args, chosen) -> None:
    for work in (Work(LARGE, 1, 512), Work(LARGE, 2, 1024)):
        sides = ON_A_CARD if args.device == "cuda" else [QLITE, AGAIN, AUTO, TRAINER, LIMIT]
        table(f"{work}; each side's own allocator settings", work, in_turns(work, chosen(sides), args), args)


def run_7b(args, chosen) -> None:
    # The second gives a fast card so much to do that nobody waits for the host, which is how a consumer's card has it with the first.
    for work in (Work(LLAMA7B, 1, 2048), Work(LLAMA7B, 4, 2048)):
        if args.device == "cpu":
            print(f"\n{work}: only with --device cuda; a step would take a quarter of an hour here")
        else:
            table(f"{work}", work, in_turns(work, chosen(ON_A_CARD), args), args)


def run_ablation(args, chosen) -> None:
    work = Work(SMALL, 4, 512)
    table(f"{work}; qlite, one part changed at a time", work, in_turns(work, chosen(ABLATION), args), args)


def in_turns(work: Work, sides: list[Side], args) -> dict[str, dict]:
    """Return what each side says of itself, by name: its step times in "seconds", its memory, its load time."""
    lie, running = prepared(work, args), {}
    try:
        for side in sides:
            running[side.name] = start(side, work, lie, args)
        found = {name: {"seconds": [], **next_line(name, process)} for name, process in running.items()}
        for turn in range(args.rounds + 1):
            for name, process in running.items():
                for _ in range(STEPS_OF_A_TURN):
                    process.stdin.write("\n")
                    process.stdin.flush()
                    said = next_line(name, process)
                    seconds = said.pop("seconds")
                found[name]["seconds"] += [seconds] if turn else []  # the first warms up
                found[name] |= said
            print(f"  round {turn} of {args.rounds}", file=sys.stderr, flush=True)
        return found
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def given_variables() -> dict[str, str]:
    """Return the environment that this process was started with, without what the import of qlite set for qlite alone."""
    lines = Path("/proc/self/environ").read_bytes().decode(errors="surrogateescape").split("\0")
    return dict(line.split("=", 1) for line in lines if "=" in line)


def start(side: Side, work: Work, lie: dict[str, str], args) -> subprocess.Popen:
    """Start a side's process. All of them load at once."""
    python = python_of(args.out, side.environment)
    if not python.exists():
        raise MachineError(f"{side.name}: there is no {python}; run with --setup first, or without it: --sides qlite,products")
    out = Path(tempfile.mkdtemp(prefix=f"{side.runs}-", dir=args.out))
    told = {
        **lie,
        "out": str(out),
        "micro_batch": work.micro_batch,
        "tokens": work.tokens,
        "steps": STEPS_OF_A_TURN * (args.rounds + 1),
        "rank": RANK,
        "alpha": ALPHA,
        "lr": LR,
        "optimizer": "adamw" if side.runs == "qlite" else "adamw_torch_fused",
        "dtype": args.dtype,
        "device": args.device,
        "keys": side.keys,
        "allocator": side.allocator,
    }
    (out / "work.json").write_text(json.dumps(told), encoding="utf-8")
    variables = {**given_variables(), **side.variables, **(RAISED if side.allocator == "raised" else {})}
    command = [str(python), str(HERE / "bench_sides.py"), side.runs, str(out / "work.json")]
    with (out / "log").open("w", encoding="utf-8") as log:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        process = subprocess.Popen(command, cwd=out, env=variables, text=True, **pipes)
    process.log = out / "log"
    print(f"  {side.name}", file=sys.stderr, flush=True)
    return process


def next_line(name: str, process: subprocess.Popen) -> dict:
    """Return the next thing that a side says of itself; what its libraries print is passed over."""
    for line in process.stdout:
        if line.startswith("@"):
            return json.loads(line[1:])
    last = process.log.read_text(encoding="utf-8").strip().splitlines()[-1:]
    raise MachineError(f"{name} ended: {''.join(last)} (all of it: {process.log})")


def table(title: str, work: Work, found: dict[str, dict], args) -> None:
    """Print the sides as a Markdown table."""
    tokens = work.micro_batch * work.tokens
    print(f"\n{title}, {args.dtype}, rank {RANK}, checkpointed, {args.rounds} rounds\n")
    columns = ["", "tokens/s (spread)", "qlite's to it, round by round (spread)", "of the products' speed"]
    # On a card: what torch reserved there, and of that in tensors; else the process, and of that the most that no file has.
    where, most, inner = ("card", "reserved", "allocated") if args.device == "cuda" else ("process", "process", "anonymous")
    columns += [f"{where} MiB at most", "qlite's to it", f"{inner} MiB at most", "s to load, all at once"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    ours, limit = found.get(QLITE.name), found.get(LIMIT.name)
    for name, side in found.items():
        speeds = [tokens / seconds for seconds in side["seconds"]]
        ratios = [b / a for a, b in zip(ours["seconds"], side["seconds"], strict=True)] if ours else []
        share = f"{statistics.median(b / a for a, b in zip(side['seconds'], limit['seconds'], strict=True)):.0%}" if limit else ""
        print(
            f"| {name} | {spread(speeds, '.0f')} | {spread(ratios, '.2f') if ratios else ''} | {share} | {side[most] / MIB:.0f} "
            f"| {ours[most] / side[most] if ours else 0:.2f} | {side[inner] / MIB:.0f} "
            f"| {side['load_seconds']:.1f} |",
            flush=True,
        )
    for ours in (AGAIN, AUTO):
        for name, side in found.items() if ours.name in found else ():
            if name == ours.name:
                continue
            ratios = [theirs / own for own, theirs in zip(found[ours.name]["seconds"], side["seconds"], strict=True)]
            share = found[ours.name][inner] / side[inner]
            print(f"{ours.name}, to {name}, round by round: {spread(ratios, '.2f')}; {share:.2f} of its {inner} bytes", flush=True)


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


# Bases and rows


def prepared(work: Work, args) -> dict[str, str]:
    """Return where base, rows and ids lie, made once."""
    here("prepare", args, work)
    return places(args.out, work.model, work.tokens)


def here(piece: str, args, work: Work) -> None:
    """Run a piece of bench_pieces.py in a process of its own."""
    told = {"out": str(args.out), "dtype": args.dtype, "device": args.device, "rank": RANK, "alpha": ALPHA, "lr": LR, **vars(work)}
    told |= {**places(args.out, work.model, work.tokens), "steps": 2}
    with (args.out / "log").open("w", encoding="utf-8") as log:
        command = [sys.executable, str(HERE / "bench_pieces.py"), piece, json.dumps(told)]
        done = subprocess.run(command, stdout=log, stderr=log, env=given_variables())
    if done.returncode:
        raise MachineError(f'"{piece}" ended with exit code {done.returncode}; what it said is in {args.out / "log"}')


# Counts


def run_counts(args, _chosen) -> None:
    work = Work(SMALL, 4, 512)
    prepared(work, args)
    found = {}
    for piece in ("counts of qlite", "counts of qlite, attention kept", "counts of PEFT + Trainer"):
        here(piece, args, work)
        found[piece.removeprefix("counts of ")] = json.loads((args.out / f"{piece}.json").read_text(encoding="utf-8"))
    print(f"\n{work}, {args.dtype}: the second step, with its optimizer, counted op by op; attention is one kernel, as on a card\n")
    names = {"kernels": "kernels", "bytes": "GB read and written", "flops": "GFLOP", "dequantised": "dequantisations of each weight"}
    print("| | " + " | ".join(names.values()) + " | " + " | ".join(f"{card}, s, an estimate" for card in CARDS) + " |")
    print("|---" * (1 + len(names) + len(CARDS)) + "|")
    for name, counts in found.items():
        values = [f"{counts['kernels']:,}", f"{counts['bytes'] / 1e9:.1f}", f"{counts['flops'] / 1e9:.0f}", f"{counts['dequantised']:.2f}"]
        print(f"| {name} | " + " | ".join([*values, *(f"{counts['cards'][card]:.3f}" for card in CARDS)]) + " |")
    theirs = found["PEFT + Trainer"]
    for name, counts in found.items():
        print(
            f"{name}: {counts['kernels'] / theirs['kernels']:.2f} of PEFT's kernels, {counts['bytes'] / theirs['bytes']:.2f} of its bytes"
        )


# Loading


def run_load(args, _chosen) -> None:
    work = Work(LARGE, 1, 512)
    prepared(work, args)
    pieces = ["load by transformers", "load by qlite", "load by qlite, cached"]
    here(pieces[-1], args, work)  # what it reads is written now
    found = {piece: [] for piece in pieces}
    for _ in range(3):
        for piece in pieces:
            here(piece, args, work)
            found[piece].append(json.loads((args.out / "load.json").read_text(encoding="utf-8")))
    print(f"\n{LARGE}: from bfloat16 files to NF4, after imports, each in a fresh process, 3 rounds\n")
    print("| | seconds (spread) | to transformers' | process MiB at most, imports and all |\n|---|---|---|---|")
    base = statistics.median(one["seconds"] for one in found[pieces[0]])
    for piece, runs in found.items():
        seconds = [one["seconds"] for one in runs]
        most = max(one["process"] for one in runs) / MIB
        print(
            f"| {piece.removeprefix('load by ')} | {spread(seconds, '.2f')} | {statistics.median(seconds) / base:.2f} | {most:.0f} |",
            flush=True,
        )


RUN = {"small": run_small, "large": run_large, "7b": run_7b, "counts": run_counts, "load": run_load, "ablation": run_ablation}

if __name__ == "__main__":
    run_verb(main)
