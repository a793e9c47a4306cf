"""Ask a trained model, through the chat template it was trained with.

python -m qlite.generate --prompt "Two lamps for Ann in Oslo on Monday, please."
python -m qlite.generate runs/mine --prompt "..." --base --temperature 0.7 --top-p 0.9
python -m qlite.generate --adapter a=runs/a --adapter b=runs/b --prompt "..." --prompt "..."    all adapters in one batch

An adapter is a finished run or a folder in PEFT's format, all of one base: that of RUN if it is named, else of the first that is a run.
One of PEFT's that is more than low-rank updates of linears ((IA)^3, a prompt, a prefix, saved layers) answers too, with no other beside it.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from qlite.calls import called
from qlite.device import MemoryMeter, peak_process_bytes, seed_all
from qlite.errors import DataError, RunError
from qlite.model.wheel import Progress
from qlite.serving.alone import Alone
from qlite.serving.answer import Sampling, answer_all, answer_ids
from qlite.serving.bank import BASE, AdapterBank
from qlite.serving.dialogue import Dialogue
from qlite.streams import clean_lines
from qlite.training.notebook import console_for
from qlite.training.open_bank import OpenBank, open_bank
from qlite.training.open_run import open_run
from qlite.training.report import Observer
from qlite.training.run_folder import RunFolder, find_run
from qlite.training.shown import Shown
from qlite.units import format_bytes
from qlite.verb import let_call, run_verb

GREEDY = Sampling()


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
    if args.base:
        require_base(run)
    dialogue = dialogue_of(run, args)
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


def require_base(run: RunFolder) -> None:
    """Raise RunError if the untuned model is not in what ``run`` has trained."""
    method = run.recipe().method
    if method.trains_base:
        raise RunError(
            f'--base: "{run.path}" has trained the model\'s own weights ({method.words}), so the base is not in it; '
            "python -m qlite.evaluate measures both"
        )


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
    say_speed(f"{len(rows)} row{'s' * (len(rows) > 1)}, {speed_of(sum(map(len, answers)), seconds)} together", meter)


def answer_rows(bank: OpenBank, rows: list[tuple[str, str]], system: str | None, sampling: Sampling) -> list[list[int]]:
    """Return the ids that answer each (prompt, adapter's name) of ``rows``; ``system``: by default what each adapter was trained under."""
    model, encoder, voices = bank.opened.base.model, bank.opened.encoder, bank.voices
    prompts = []
    for prompt, name in rows:
        dialogue = Dialogue(model, encoder, sampling, voices.systems[name] if system is None else system)
        prompts.append(dialogue.fit(prompt)[0])
    room = (dialogue.limit or sys.maxsize) - max(map(len, prompts))  # of the model's context, beside the longest prompt
    sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
    answers: list[list[int]] = [[]] * len(rows)
    names = dict.fromkeys(name for _, name in rows)
    for those in [names] if voices.bank.mixes else [{name: None} for name in names]:
        turn = [place for place, (_, name) in enumerate(rows) if name in those]
        choose = partial(_choose, voices.bank, [rows[place][1] for place in turn])
        for place, ids in zip(turn, answer_ids(model, encoder, [prompts[each] for each in turn], sampling, chosen=choose), strict=True):
            answers[place] = ids
    return answers


def _choose(bank: AdapterBank | Alone, names: list[str], places: list[int]) -> None:
    bank.use([names[place] for place in places])


def show_prompt(prompt: str, args: argparse.Namespace) -> None:
    """Print ``prompt`` above its answers, where there are several prompts."""
    if len(args.prompt) > 1:
        print(f"> {clean_lines(prompt)}", flush=True)


def say_speed(speed: str, meter: MemoryMeter) -> None:
    """Say on standard error how fast it went, and the peak memory."""
    memory = meter.read()
    peak = memory.peak if memory.reserved is not None else peak_process_bytes()
    print(f"[{speed}, peak memory {format_bytes(peak)}]", file=sys.stderr)


def generate(
    run: str | os.PathLike[str] | None,
    prompts: str | Sequence[str],
    *,
    base: bool = False,
    system: str | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> "Answers":
    """Return what ``run`` answers to each of ``prompts``, one text or several, through the chat template it was trained with.

    run: what ``train`` has returned, or a run folder; None: the newest finished one under runs/.
    base: let the untuned model answer, too, to compare.
    system: the system message; by default the one that all training rows had, if any.
    sampling: Sampling(max_tokens=64, temperature=0.7, top_p=0.9); by default the most likely token each time, 256 at most.

    Raises:
        QliteError: there is no such finished run, a prompt is empty or too long, or memory runs out.
    """
    asked = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Iterable) else []
    if not asked or not all(isinstance(prompt, str) for prompt in asked):
        raise DataError("generate: prompts should be a text, or a list of texts that is not empty")
    with called():
        own = find_run(run)
        if base:
            require_base(own)
        with console_for(f"qlite generate  {own.path}", quiet) as console:
            dialogue = open_dialogue(own, sampling, system, device, console.phase)
            seed_all(seed)
            answers = _answer(dialogue, asked, "answer", console)
            if not base:
                return Answers(tuple(asked), answers)
            dialogue.toggle_base()
            seed_all(seed)
            return Answers(tuple(asked), answers, _answer(dialogue, asked, "answer without the adapter", console))


@dataclass(frozen=True, repr=False)
class Answers(Shown):
    """The answers to some prompts, in order; what can be counted, indexed and gone through are the ``texts``."""

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    base_texts: tuple[str, ...] | None = None
    """What the untuned model answers; None: it was not asked."""

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:
        return self.texts[index]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for index, prompt in enumerate(self.prompts):
            yield Text(f"{'' if index == 0 else chr(10)}> {clean_lines(prompt)}", "bold")
            if self.base_texts is not None:
                yield Text.assemble(("base   ", "dim"), clean_lines(self.base_texts[index]))
            yield Text.assemble(("tuned  " if self.base_texts is not None else "", "dim"), clean_lines(self.texts[index]))


def _answer(dialogue: Dialogue, prompts: list[str], name: str, console: Observer) -> tuple[str, ...]:
    """Return the answer to each of ``prompts``, none of which sees another."""
    ids = [dialogue.fit(prompt)[0] for prompt in prompts]
    # As in a dialogue, an answer may be as long as the context leaves room; here for the longest prompt.
    room = (dialogue.limit or sys.maxsize) - max(len(each) for each in ids)
    sampling = replace(dialogue.sampling, max_tokens=min(dialogue.sampling.max_tokens, room))
    console.phase(name, 0, len(ids))
    told = partial(_tell, console, name, len(ids))
    return tuple(answer_all(dialogue.model, dialogue.encoder, ids, sampling, told, console.note))


def _tell(console: Observer, name: str, total: int, done: int) -> None:
    console.phase(name, done, total)


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


def dialogue_of(run: RunFolder, args: argparse.Namespace) -> Dialogue:
    """Return ``open_dialogue`` as the options of the command line say."""
    return open_dialogue(run, Sampling(args.max_tokens, args.temperature, args.top_p), args.system, args.device, lambda *_: None)


def open_dialogue(run: RunFolder, sampling: Sampling, system: str | None, device: str, progress: Progress) -> Dialogue:
    """Load ``run`` with its adapter on, and return a conversation with it, as yet empty.

    Raises:
        QliteError: the run cannot be opened.
    """
    opened = open_run(run, device, progress)
    opened.attach()
    return Dialogue(opened.base.model, opened.encoder, sampling, run.result["system"] if system is None else system)


def write_answer(text: str) -> None:
    """Write a piece of an answer to standard output, at once."""
    print(clean_lines(text), end="", flush=True)


def speed_of(tokens: int, seconds: float) -> str:
    """Return how long an answer is and how fast it came."""
    return f"{tokens} {'token' if tokens == 1 else 'tokens'}, {tokens / seconds:.1f} tokens/s"


let_call(__name__, generate)

if __name__ == "__main__":
    run_verb(main)
