"""Ask a trained model, through the chat template it was trained with.

python -m qlite.generate --prompt "Two lamps for Ann in Oslo on Monday, please."
python -m qlite.generate runs/mine --prompt "..." --base --temperature 0.7 --top-p 0.9
"""

import argparse
import sys
import time

import torch

from qlite.device import MemoryMeter, peak_process_bytes, seed_all
from qlite.serving.answer import Sampling, TextStream, generate_ids
from qlite.training.console import clean
from qlite.training.open_run import OpenRun, open_run
from qlite.training.run_folder import find_run
from qlite.units import format_bytes
from qlite.verb import run_verb


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qlite.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", help="run folder; without it the newest finished one under runs/")
    parser.add_argument("--prompt", required=True, help="what to ask")
    parser.add_argument("--system", help="system message; by default the one that all training rows had, if any")
    parser.add_argument("--base", action="store_true", help="let the untuned model answer first, to compare")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the most likely tokens with this share")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    args = parser.parse_args(argv)
    run = find_run(args.run)
    opened = open_run(run, args.device, lambda *_: None)
    system = run.result["system"] if args.system is None else args.system
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": args.prompt})
    sampling = Sampling(args.max_tokens, args.temperature, args.top_p)
    if args.base:
        print("base model:", flush=True)
        ask(opened, messages, sampling, args.seed)
        print(f"\n{run.path}:", flush=True)
    opened.attach()
    ask(opened, messages, sampling, args.seed)


def ask(opened: OpenRun, messages: list[dict[str, str]], sampling: Sampling, seed: int) -> None:
    """Stream the answer to standard output; its speed and the peak memory go to standard error."""
    seed_all(seed)
    meter = MemoryMeter(opened.device)
    stream = TextStream(opened.encoder, lambda text: print(clean_lines(text), end="", flush=True))
    ids = torch.tensor([opened.encoder.encode_prompt(messages)])
    start = time.perf_counter()
    new = generate_ids(opened.base.model, opened.encoder, ids, torch.ones_like(ids), sampling, stream)
    seconds = time.perf_counter() - start
    print(flush=True)
    memory = meter.read()
    peak = memory.peak if memory.reserved is not None else peak_process_bytes()
    print(f"[{new.shape[1]} tokens, {new.shape[1] / seconds:.1f} tokens/s, peak memory {format_bytes(peak)}]", file=sys.stderr)


def clean_lines(text: str) -> str:
    """Return ``text`` with line breaks and tabs kept and whatever would steer the terminal removed."""
    return "\n".join("\t".join(clean(part, limit=len(part) + 1) for part in line.split("\t")) for line in text.split("\n"))


if __name__ == "__main__":
    run_verb(main)
