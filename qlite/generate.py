"""Ask a trained model, through the chat template it was trained with.

python -m qlite.generate --prompt "Two lamps for Ann in Oslo on Monday, please."
python -m qlite.generate runs/mine --prompt "..." --base --temperature 0.7 --top-p 0.9
python -m qlite.generate --adapter a=runs/a --adapter b=runs/b --prompt "..." --prompt "..."    all adapters in one batch

An adapter is a finished run or a folder in PEFT's format, all of one base: that of RUN if it is named, else of the first that is a run.
"""

import argparse
import sys
import time
from dataclasses import replace

from qlite.device import MemoryMeter, peak_process_bytes, seed_all
from qlite.serving.answer import Sampling, answer_ids
from qlite.serving.bank import BASE
from qlite.serving.dialogue import Dialogue
from qlite.streams import clean_lines
from qlite.training.open_bank import OpenBank, open_bank
from qlite.training.open_run import open_run
from qlite.training.run_folder import RunFolder, find_run
from qlite.units import format_bytes
from qlite.verb import run_verb


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qlite.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", action="append", required=True, help="what to ask; may be given several times")
    parser.add_argument("--base", action="store_true", help="let the untuned model answer too, to compare")
    add_answer_options(parser, max_tokens=256)
    args = parser.parse_args(argv)
    if args.adapter:
        ask_all(args)
        return
    run = find_run(args.run)
    dialogue = open_dialogue(run, args)
    for prompt in args.prompt:
        show_prompt(prompt, args)
        if args.base:
            print("base model:", flush=True)
            dialogue.toggle_base()
            ask(dialogue, prompt, args)
            dialogue.toggle_base()
            dialogue.reset()
            print(f"\n{run.path}:", flush=True)
        ask(dialogue, prompt, args)
        dialogue.reset()


def ask(dialogue: Dialogue, prompt: str, args: argparse.Namespace) -> None:
    """Stream the answer to standard output; its speed and the peak memory go to standard error."""
    seed_all(args.seed)
    meter = MemoryMeter(dialogue.model.device)
    reply = dialogue.ask(prompt, write_answer)
    print(flush=True)
    if reply.is_interrupted:
        raise KeyboardInterrupt
    say_speed(speed_of(reply.tokens, reply.seconds), meter)


def ask_all(args: argparse.Namespace) -> None:
    """Let every adapter answer every prompt, all in one batch as far as the memory goes, and print the answers under their names."""
    sampling = Sampling(args.max_tokens, args.temperature, args.top_p)
    bank = open_bank(args.run, args.adapter, args.device, lambda *_: None)
    for line in bank.notes:
        print(line, file=sys.stderr)
    names = [*([BASE] if args.base else []), *bank.voices.bank.names]
    rows = [(prompt, name) for prompt in args.prompt for name in names]
    seed_all(args.seed)
    meter, started = MemoryMeter(bank.opened.device), time.perf_counter()
    answers = answer_rows(bank, rows, args.system, sampling)
    seconds, encoder = time.perf_counter() - started, bank.opened.encoder
    for (prompt, name), ids in zip(rows, answers, strict=True):
        if name == names[0]:
            show_prompt(prompt, args)
        print(f"{clean_lines(name)}:")
        write_answer(encoder.decode([token for token in ids if token not in encoder.stop_ids]))
        print("\n", flush=True)
    say_speed(f"{len(rows)} rows, {speed_of(sum(map(len, answers)), seconds)} together", meter)


def answer_rows(bank: OpenBank, rows: list[tuple[str, str]], system: str | None, sampling: Sampling) -> list[list[int]]:
    """Return the ids that answer each (prompt, adapter's name) of ``rows``; ``system``: by default what each adapter was trained under."""
    model, encoder, voices = bank.opened.base.model, bank.opened.encoder, bank.voices
    prompts = []
    for prompt, name in rows:
        dialogue = Dialogue(model, encoder, sampling, voices.systems[name] if system is None else system)
        prompts.append(dialogue.fit(prompt)[0])
    room = (dialogue.limit or sys.maxsize) - max(map(len, prompts))  # of the model's context, beside the longest prompt
    sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
    return answer_ids(model, encoder, prompts, sampling, chosen=lambda places: voices.bank.use([rows[place][1] for place in places]))


def show_prompt(prompt: str, args: argparse.Namespace) -> None:
    """Print ``prompt`` above its answers, where there are several prompts."""
    if len(args.prompt) > 1:
        print(f"> {clean_lines(prompt)}", flush=True)


def say_speed(speed: str, meter: MemoryMeter) -> None:
    """Say on standard error how fast it went, and the peak memory."""
    memory = meter.read()
    peak = memory.peak if memory.reserved is not None else peak_process_bytes()
    print(f"[{speed}, peak memory {format_bytes(peak)}]", file=sys.stderr)


# What generate and chat share.


def add_answer_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Add the run folder, and the options that say how it answers: --system, sampling, --device."""
    parser.add_argument("run", nargs="?", help="run folder; without it the newest finished one under runs/")
    parser.add_argument(
        "--adapter", action="append", metavar="NAME=FOLDER", help="an adapter to answer by; given several times, all of them on one base"
    )
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


def speed_of(tokens: int, seconds: float) -> str:
    """Return how long an answer is and how fast it came."""
    return f"{tokens} {'token' if tokens == 1 else 'tokens'}, {tokens / seconds:.1f} tokens/s"


if __name__ == "__main__":
    run_verb(main)
