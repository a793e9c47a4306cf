"""Ask a trained model, through the chat template it was trained with.

python -m qlite.generate --prompt "Two lamps for Ann in Oslo on Monday, please."
python -m qlite.generate runs/mine --prompt "..." --base --temperature 0.7 --top-p 0.9
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from qlite.calls import called
from qlite.device import MemoryMeter, peak_process_bytes, seed_all
from qlite.errors import DataError
from qlite.model.wheel import Progress
from qlite.serving.answer import Sampling, answer_all
from qlite.serving.dialogue import Dialogue, Reply
from qlite.streams import clean_lines
from qlite.training.notebook import console_for
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
    parser.add_argument("--prompt", required=True, help="what to ask")
    parser.add_argument("--base", action="store_true", help="let the untuned model answer first, to compare")
    add_answer_options(parser, max_tokens=256)
    args = parser.parse_args(argv)
    run = find_run(args.run)
    dialogue = dialogue_of(run, args)
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


def speed_of(reply: Reply) -> str:
    """Return how long an answer is and how fast it came."""
    return f"{reply.tokens} {'token' if reply.tokens == 1 else 'tokens'}, {reply.tokens / reply.seconds:.1f} tokens/s"


let_call(__name__, generate)

if __name__ == "__main__":
    run_verb(main)
