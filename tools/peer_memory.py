"""How much memory the same three steps take in qlite and in transformers' Trainer with PEFT: every tensor, and the whole process.

    pip install peft accelerate
    python tools/peer_memory.py                 # all cases, about a minute each; exits 1 if a promise is not kept
    python tools/peer_memory.py --only plain    # the peer, and ours whose name contains "plain"

The work: SmolLM2-135M (recipes/quickstart.toml's) in NF4 with double quantisation, LoRA r 8 on all linears, micro-batches of
4 x 512 random tokens, all of them trained, per-block checkpointing, AdamW. Both sides load the same bfloat16 folder and see the
same ids, and each case has a process of its own. ``qlite`` goes the way of ``python -m qlite.train``, plan and data cache and all:
the steps are ``qlite.training.run``'s own.

One ledger (qlite/memory/ledger.py) follows the tensors of both while they train. "over the model" is its peak less the frozen
weights: adapter, gradients, optimizer, activations, and whatever else lives then. What a kernel allocates inside itself no ledger
sees. The process's peak is the kernel's VmHWM, loading and libraries and all; so it needs Linux. Times are the processor's, not the
clock's, and include the ledger's own: good for a ratio only.
"""

import argparse
import gc
import importlib.util
import json
import random
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from qlite.errors import MachineError, QliteError

# Torch, the Trainer and PEFT are imported by the cases that use them: what a side imports is a part of its memory.

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
ROWS, TOKENS, STEPS, RANK, ALPHA, LR = 4, 512, 3, 8, 16, 1e-4
NEEDED = ("peft", "accelerate")
TENSOR_LIMIT, PROCESS_LIMIT = 0.25, 0.36
"""What the plain recipe may take at most, as a share of the peer's."""
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    peer: bool = False
    optimizer: str = "adamw"
    keys: dict[str, object] = field(default_factory=dict)
    """Recipe keys of ours that differ from the plain recipe."""

    @property
    def file(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in self.name) + ".json"


def _vocabulary(bits: int) -> dict[str, object]:
    return {"base.embedding_bits": bits, "base.head_bits": bits}  # one tensor in this model


PEER, PLAIN = "Trainer + PEFT, adamw_torch", "qlite, plain, adamw"
ALL_LOW = {"memory.saved_inputs": "host", "memory.mlp_chunk": 256, "memory.base": "host", "memory.loss_chunk": 128, **_vocabulary(4)}
CASES = [
    Case(PEER, peer=True, optimizer="adamw_torch"),
    Case("Trainer + PEFT, adamw_bnb_8bit", peer=True, optimizer="adamw_bnb_8bit"),
    Case(PLAIN),
    Case("qlite, plain, paged_adamw8bit", optimizer="paged_adamw8bit"),
    Case("embedding_bits = head_bits = 8", keys=_vocabulary(8)),
    Case("embedding_bits = head_bits = 4", keys=_vocabulary(4)),
    Case("saved_inputs = host", keys={"memory.saved_inputs": "host"}),
    Case("saved_inputs = 8bit", keys={"memory.saved_inputs": "8bit"}),
    Case("mlp_chunk = 256", keys={"memory.mlp_chunk": 256}),
    Case("base = host", keys={"memory.base": "host"}),
    Case("loss_chunk = 128", keys={"memory.loss_chunk": 128}),
    Case("all of them, paged_adamw8bit", optimizer="paged_adamw8bit", keys=ALL_LOW),
]


def main(argv: list[str]) -> int:
    """Run the cases and print the table; return 1 if the plain recipe takes more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="of ours, only cases whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("build/peer_memory"), help="the folder of base, rows and results")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # this process is one of the cases
    args = parser.parse_args(argv)
    if args.case:
        _run_here(args.case, args.out)
        return 0
    require_packages()
    _in_its_own_process("prepare", args.out)
    results = {}
    for case in CASES:
        if args.only in case.name or case.name == PEER:
            _in_its_own_process(case.name, args.out)
            results[case.name] = json.loads((args.out / case.file).read_text(encoding="utf-8"))
            print(f"{case.name}: {results[case.name]}", file=sys.stderr, flush=True)
    print("\n".join(table(results)))
    wrong = broken_promises(results)
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


def require_packages() -> None:
    """Raise MachineError if the peer cannot be run here."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MachineError(f"transformers' Trainer with PEFT also needs {' and '.join(missing)}: pip install {' '.join(NEEDED)}")
    if not Path("/proc/self/status").is_file():
        raise MachineError("the peak of a process is read from /proc/self/status, which only Linux has")


def table(results: dict[str, dict]) -> list[str]:
    """Return the lines of a Markdown table of ``results``, by name of case."""
    lines = [
        "| what | tensors over the model, MiB | to the peer's | all tensors, MiB | offloaded, MiB | process at most, MiB "
        "| to the peer's | before training, MiB | CPU time a step, to the peer's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    peer = results[PEER]
    for name, result in results.items():
        over, total, host, most, before = (result[key] / MIB for key in ("over", "total", "host", "process", "process_before"))
        ratios = [result[key] / peer[key] for key in ("over", "process", "seconds")]
        lines.append(
            f"| {name} | {over:.0f} | {ratios[0]:.3f} | {total:.0f} | {host:.0f} | {most:.0f} | {ratios[1]:.3f} | {before:.0f} "
            f"| {ratios[2]:.2f} |"
        )
    return lines


def broken_promises(results: dict[str, dict]) -> list[str]:
    """Return, a line each, what the plain recipe takes more of than it may; nothing if it was not run."""
    wrong = []
    for key, limit, what in (("over", TENSOR_LIMIT, "tensors over the model"), ("process", PROCESS_LIMIT, "process memory at its peak")):
        share = results[PLAIN][key] / results[PEER][key] if PLAIN in results else 0
        if share > limit:
            wrong.append(f"{what}: {share:.3f} of the peer's, which is more than {limit}")
    return wrong


# One case, in a process of its own


def _in_its_own_process(case: str, out: Path) -> None:
    done = subprocess.run([sys.executable, __file__, "--case", case, "--out", str(out)])
    if done.returncode:
        raise MachineError(f'"{case}" ended with exit code {done.returncode}')


def _run_here(name: str, out: Path) -> None:
    if name == "prepare":
        prepare(out)
        return
    case = next(case for case in CASES if case.name == name)
    result = run_peer(case, out) if case.peer else run_qlite(case, out)
    (out / case.file).write_text(json.dumps(result, indent=2), encoding="utf-8")


def prepare(out: Path) -> None:
    """Write base, rows and ids into ``out``, once."""
    from transformers import AutoTokenizer

    from qlite.files import is_whole

    if not is_whole(out / "base"):
        write_base(out / "base")
    write_rows(out, AutoTokenizer.from_pretrained(out / "base"), STEPS * ROWS, TOKENS)


def write_rows(folder: Path, tokenizer, count: int, tokens: int) -> None:
    """Write ``count`` rows of ``tokens`` tokens, as texts and as ids: of words that are one token each, so both sides know the ids."""
    from qlite.files import write_json, write_text

    chance, names = random.Random(0), tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [number for number, name in enumerate(names) if name[0] == "\u0120" and name[1:].isascii() and name[1:].isalpha()]
    rows = [chance.choices(words, k=tokens - 1) for _ in range(count)]
    texts = [tokenizer.decode(row) for row in rows]
    assert [tokenizer(text)["input_ids"] for text in texts] == rows
    write_text(folder / "rows.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_json(folder / "ids.json", [[*row, tokenizer.eos_token_id] for row in rows])


def write_base(folder: Path) -> None:
    """Write the quickstart's base, not quantised, as a folder that both sides read."""
    import torch

    from qlite.formats.merged import write_merged
    from qlite.model.load import Base

    base = tomllib.loads(QUICKSTART.read_text(encoding="utf-8"))["base"]
    loaded = Base(model=base["model"], sha256=base["sha256"], bits=16).load(torch.device("cpu"), lambda *_: None)
    write_merged(folder, loaded.model, loaded.tokenizer, loaded.generation_config, torch.bfloat16, lambda *_: None)


def _work(case: Case, out: Path) -> dict:
    """Return the case as a side of tools/bench_sides.py is told it."""
    return {
        **{name: str(out / place) for name, place in (("base", "base"), ("rows", "rows.jsonl"), ("ids", "ids.json"), ("out", "."))},
        **{"steps": STEPS, "micro_batch": ROWS, "tokens": TOKENS, "rank": RANK, "alpha": ALPHA, "lr": LR},
        **{"dtype": "bfloat16", "device": "cpu", "optimizer": case.optimizer, "keys": case.keys},
    }


def run_qlite(case: Case, out: Path) -> dict:
    """Train as ``python -m qlite.train`` does and return what it took."""
    import bench_sides

    from qlite.recipe.read import build_recipe
    from qlite.training.forecast import adopt_all
    from qlite.training.run import prepare
    from qlite.training.run_folder import RunFolder
    from qlite.training.state import TrainState
    from qlite.training.steps import take_steps

    recipe = build_recipe(bench_sides.recipe_tables(_work(case, out)), "peer_memory")
    run, told = RunFolder(Path(recipe.output.dir)), _Told()
    parts = prepare(recipe, told)
    ids = json.loads((out / "ids.json").read_text(encoding="utf-8"))
    assert sorted(list(map(int, parts.data.train[index].ids)) for index in range(len(parts.data.train))) == sorted(ids)
    run.discard()
    run.begin(recipe, parts.identity, parts.data.encoder.template, parts.machine)
    followed = Followed(lambda ledger: adopt_all(ledger, parts.model, parts.optimizer), parts.model)
    with followed:
        take_steps(recipe, parts, run, told, TrainState())
    return followed.result(told.step_seconds, told.losses)


def run_peer(case: Case, out: Path) -> dict:
    """Train as PEFT's guide to quantised models says, with transformers' Trainer, and return what it took."""
    import bench_sides
    from transformers import PrinterCallback, TrainerCallback
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    told = _Told()

    class Clock(TrainerCallback):
        """Notes when every step ends."""

        def on_step_end(self, *_, **__):
            told.ended()

    trainer = bench_sides.peft_trainer(_work(case, out), Clock())
    trainer.remove_callback(PrinterCallback)
    followed = Followed(lambda _: None, trainer.model)
    with followed:
        trainer.train()
    return followed.result(told.step_seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


class _Told:
    """An observer that keeps the loss of every step, and the process's CPU time at its end."""

    def __init__(self):
        self.ends: list[float] = []
        self.losses: list[float] = []

    @property
    def step_seconds(self) -> float:
        """CPU seconds of the fastest step; the first, which warms up, does not count."""
        return min(end - before for before, end in pairwise(self.ends))

    def ended(self) -> None:
        self.ends.append(time.process_time())

    def step(self, report) -> None:
        self.ended()
        self.losses.append(report.loss)

    def note(self, message: str) -> None:
        print(message, file=sys.stderr)

    def phase(self, *_: object) -> None: ...


class Followed:
    """A ``with`` block in which a ledger follows every tensor, and what came of it.

    All that is alive before it is weights, except what is trained and what ``adopt`` gives another term.
    """

    def __init__(self, adopt, model):
        from qlite.memory import terms
        from qlite.memory.ledger import Ledger

        gc.collect()
        self.ledger = Ledger()
        self.ledger.adopt(_living_tensors(), terms.BASE)
        adopt(self.ledger)
        self.ledger.adopt((p for p in model.parameters() if p.requires_grad), terms.ADAPTER)
        self.frozen = sum(self.ledger.now.get(term, 0) for term in (terms.BASE, terms.CONSTANTS, terms.VOCABULARY, terms.REST))
        self.alive = self.ledger.bytes
        self.before = _status("VmRSS")

    def __enter__(self) -> None:
        self.ledger.__enter__()

    def __exit__(self, *error: object) -> None:
        self.ledger.__exit__(*error)

    def result(self, step_seconds: float, losses: list[float]) -> dict:
        """Return bytes, with the step's CPU seconds and the losses."""
        peak = max(self.ledger.moments.values(), key=lambda peak: peak.bytes)
        return {
            "over": peak.bytes - self.frozen,
            "over_alive": peak.bytes - self.alive,
            "total": peak.bytes,
            "frozen": self.frozen,
            "host": max(peak.host for peak in self.ledger.moments.values()),
            "process": _status("VmHWM"),
            "process_before": self.before,
            "seconds": step_seconds,
            "losses": losses,
        }


def _living_tensors() -> list:
    """Return every tensor of this process that has memory: what a library keeps beside the model, too."""
    import torch
    from torch._subclasses import FakeTensor

    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and not isinstance(thing, FakeTensor)]
    return [tensor for tensor in tensors if tensor.device.type != "meta" and torch._C._has_storage(tensor)]


def _status(name: str) -> int:
    """Return one of the kernel's counts of this process, in bytes. (``ru_maxrss`` begins with that of the process that started it.)"""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except QliteError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
