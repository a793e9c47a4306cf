"""Show the training console with a made-up run, so that people can look at it. Nothing is trained.

python tools/console_demo.py --gpu --seconds 30      a run on a 24 GiB card
python tools/console_demo.py --gpu --trouble         more tensors than planned, and a driver that spills to host memory
python tools/console_demo.py | cat                   the same as plain lines
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qlite.device import MemoryUse
from qlite.memory import terms
from qlite.training.console import open_console
from qlite.training.report import AnswerReport, EvalReport, Observer, StepReport
from qlite.units import GIB, MIB

QUESTION = "Which river flows through Vienna?"
GPU_TERMS = {
    terms.BASE: 3.31,
    terms.CONSTANTS: 0.05,
    terms.VOCABULARY: 0.49,
    terms.REST: 0.01,
    terms.ADAPTER: 0.08,
    terms.GRADIENTS: 0.08,
    terms.OPTIMIZER: 0.24,
    terms.SAVED: 2.01,
    terms.INSIDE: 4.11,
    terms.DEQUANTISED: 0.17,
    terms.LOSS: 2.31,
    terms.WORKSPACE: 0.03,
}
CPU_TERMS = {terms.BASE: 0.07, terms.VOCABULARY: 0.05, terms.ADAPTER: 0.01, terms.OPTIMIZER: 0.02, terms.SAVED: 0.09, terms.INSIDE: 0.31}
"""GiB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="show the figures of a 24 GiB card, else those of a CPU")
    parser.add_argument("--seconds", type=float, default=30, help="how long the show lasts")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--trouble", action="store_true", help="more tensors than planned; on a card, memory spilled to the host")
    parser.add_argument("--fail", action="store_true", help="end in an error halfway")
    options = parser.parse_args()
    device = "simulated 24 GiB card" if options.gpu else "simulated CPU"
    with open_console(f"SIMULATION · llama7b_24gb · {device}") as console:
        prepare(console, options.seconds * 0.2)
        train(console, options.seconds * 0.8, options)


def prepare(console: Observer, seconds: float) -> None:
    """Download, load and quantise, and answer before training."""
    console.note("memory: 12.9 GiB of tensors at most, in step: 10.5 GiB to spare (simulated)")
    for name, total, share in (("download", 13 * GIB, 0.5), ("load and quantise", 291, 0.3), ("encode", 51_760, 0.1)):
        for part in range(101):
            console.phase(name, total * part // 100, total)
            time.sleep(seconds * share / 101)
    evaluate(console, 0, 2.71, seconds * 0.1)
    console.answered(AnswerReport(0, 64, 3, [(QUESTION, "The Danube.", "Vienna is the capital of Austria and")]))


def train(console: Observer, seconds: float, options: argparse.Namespace) -> None:
    """Report ``options.steps`` steps with an evaluation every tenth of the run."""
    chance, steps = random.Random(0), options.steps
    for step in range(1, steps + 1):
        time.sleep(seconds * 0.9 / steps)
        done = step / steps
        loss = 0.9 + 1.8 * math.exp(-6 * done) + chance.gauss(0, 0.08)
        tokens = chance.randint(3600, 4096)
        memory = gpu_memory(step, chance, options.trouble) if options.gpu else cpu_memory(step, options.trouble)
        lr = 2e-4 * min(1.0, step / 30) * (0.55 + 0.45 * math.cos(math.pi * done))
        console.step(StepReport(step, steps, 3 * done, loss, lr, 0.4 + chance.random() / 4, tokens, tokens // 2, 1.9, memory))
        if step % max(1, steps // 10) == 0:
            evaluate(console, step, 1.0 + 1.75 * math.exp(-5 * done), seconds * 0.01)
        if options.fail and step > steps // 2:
            raise RuntimeError("simulated failure")
    console.answered(AnswerReport(steps, 64, 51, [(QUESTION, "The Danube.", "The Danube.")]))
    console.note("adapter saved to runs/simulation/adapter.safetensors (simulated)")


def evaluate(console: Observer, step: int, loss: float, seconds: float) -> None:
    for row in range(0, 65, 4):
        console.phase("evaluate", row, 64)
        time.sleep(seconds / 17)
    console.evaluated(EvalReport(step, loss, math.exp(loss), 64, 12_345, seconds))


def gpu_memory(step: int, chance: random.Random, is_troubled: bool) -> MemoryUse:
    used, reserved = int((4.3 + chance.random() / 8) * GIB), int(13.6 * GIB)
    driver = reserved + 620 * MIB + step * 1024
    spilled = int(1.2 * GIB) if is_troubled else 0
    return MemoryUse(used, int(12.9 * GIB), int(23.64 * GIB), reserved, driver, spilled, in_bytes(GPU_TERMS), planned(12.93, is_troubled))


def cpu_memory(step: int, is_troubled: bool) -> MemoryUse:
    used = 3 * GIB + (step % 50) * 8 * MIB
    return MemoryUse(used, int(3.4 * GIB), 16 * GIB, terms=in_bytes(CPU_TERMS), planned=planned(0.56, is_troubled))


def in_bytes(sizes: dict[str, float]) -> dict[str, int]:
    return {term: int(size * GIB) for term, size in sizes.items()}


def planned(size: float, is_troubled: bool) -> int:
    return int((0.8 if is_troubled else 1) * size * GIB)


if __name__ == "__main__":
    main()
