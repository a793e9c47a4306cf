"""Ask a trained model, through the chat template it was trained with.

python -m qlite.generate --prompt "Two lamps for Ann in Oslo on Monday, please."
python -m qlite.generate runs/mine --prompt "..." --base --temperature 0.7 --top-p 0.9
"""

import argparse
import sys

from qlite.device import MemoryMeter, peak_process_bytes, seed_all
from qlite.serving.answer import Sampling
from qlite.serving.dialogue import Dialogue, Reply
from qlite.streams import clean_lines
from qlite.training.open_run import open_run
from qlite.training.run_folder import RunFolder, find_run
from qlite.units import format_bytes
from qlite.verb import run_verb


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qlite.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", required=True, help="what to ask")
    parser.add_argument("--base", action="store_true", help="let the untuned model answer first, to compare")
    add_answer_options(parser, max_tokens=256)
    args = parser.parse_args(argv)
    run = find_run(args.run)
    dialogue = open_dialogue(run, args)
    if args.base:
        print("base model:", flush=True)
        dialogue.toggle_base()
        ask(dialogue, args)
        dialogue.toggle_base()
        dialogue.reset()
        print(f"\n{run.path}:", flush=True)
    ask(dialogue, args)


def ask(dialogue: Dialogue, args: argparse.Namespace) -> None:
    """Stream the answer to standard output; its speed and the peak memory go to standard error."""
    seed_all(args.seed)
    meter = MemoryMeter(dialogue.model.device)
    reply = dialogue.ask(args.prompt, write_answer)
    print(flush=True)
    if reply.is_interrupted:
        raise KeyboardInterrupt
    memory = meter.read()
    peak = memory.peak if memory.reserved is not None else peak_process_bytes()
    print(f"[{speed_of(reply)}, peak memory {format_bytes(peak)}]", file=sys.stderr)


# What generate and chat share.


def add_answer_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Add the run folder, and the options that say how it answers: --system, sampling, --device."""
    parser.add_argument("run", nargs="?", help="run folder; without it the newest finished one under runs/")
    parser.add_argument("--system", help="system message; by default the one that all training rows had, if any")
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help=f"longest answer in tokens (default {max_tokens})")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the most likely tokens with this share")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")


def open_dialogue(run: RunFolder, args: argparse.Namespace) -> Dialogue:
    """Load ``run`` with its adapter on, and return a conversation with it, as yet empty, that answers as the options say.

    Raises:
        QliteError: an option's number makes no sense (nothing is loaded then), or the run cannot be opened.
    """
    sampling = Sampling(args.max_tokens, args.temperature, args.top_p)
    opened = open_run(run, args.device, lambda *_: None)
    opened.attach()
    system = run.result["system"] if args.system is None else args.system
    return Dialogue(opened.base.model, opened.encoder, sampling, system)


def write_answer(text: str) -> None:
    """Write a piece of an answer to standard output, at once."""
    print(clean_lines(text), end="", flush=True)


def speed_of(reply: Reply) -> str:
    """Return how long an answer is and how fast it came."""
    return f"{reply.tokens} {'token' if reply.tokens == 1 else 'tokens'}, {reply.tokens / reply.seconds:.1f} tokens/s"


if __name__ == "__main__":
    run_verb(main)
