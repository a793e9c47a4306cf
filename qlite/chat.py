"""Talk with a trained model, turn after turn, in the terminal or through a pipe (one line is one turn there).

python -m qlite.chat
python -m qlite.chat runs/mine --system "Be brief." --temperature 0.7 --top-p 0.9
python -m qlite.chat --adapter a=runs/a --adapter b=runs/b       /adapter b swaps in place

A line that ends in a backslash goes on in the next. Ctrl-C stops an answer, and leaves at the prompt; Ctrl-D leaves.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper

from qlite.device import seed_all
from qlite.errors import QliteError
from qlite.generate import add_answer_options, dialogue_of, speed_of, write_answer
from qlite.serving.answer import Sampling
from qlite.serving.dialogue import Dialogue, Reply
from qlite.streams import clean, clean_lines
from qlite.training.open_bank import open_bank
from qlite.training.run_folder import find_run
from qlite.verb import run_verb


def main(argv: list[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m qlite.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_answer_options(parser, max_tokens=512)
    args = parser.parse_args(argv)
    run = None if args.adapter else find_run(args.run)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):  # a byte or a character that the terminal's encoding lacks ends no talk
            stream.reconfigure(errors="replace")
    is_typed = sys.stdin.isatty()
    if is_typed:
        note(f"loading {run.path if run else ' '.join(args.adapter)} ...")
    dialogue = dialogue_of(run, args) if run else open_talk_of_many(args)
    if is_typed:
        with contextlib.suppress(ImportError):  # arrow keys and the lines typed before; Windows has its own
            importlib.import_module("readline")
        note(f"system message: {dialogue.system}" if dialogue.system else "no system message")
        note("/help lists the commands; Ctrl-C stops an answer; Ctrl-D leaves")
    if dialogue.encoder.template is None:
        note("this run was trained on raw text: each message is continued by itself, without what was said before")
    seed_all(args.seed)
    chat(dialogue, is_typed)


def open_talk_of_many(args: argparse.Namespace) -> Dialogue:
    """Load the adapters that ``args`` name over one base, and return a conversation, as yet empty, with the first.

    Raises: as ``open_dialogue``, and AdapterError if they do not belong together.
    """
    sampling = Sampling(args.max_tokens, args.temperature, args.top_p)
    found = open_bank(args.run, args.adapter, args.device, lambda *_: None)
    for line in found.notes:
        note(line)
    opened, voices = found.opened, found.voices
    system = voices.systems[voices.bank.names[0]] if args.system is None else args.system
    return Dialogue(opened.base.model, opened.encoder, sampling, system, voices)


def chat(dialogue: Dialogue, is_typed: bool) -> None:
    """Answer message after message of standard input, until it ends or says /quit.

    Raises:
        QliteError: a message cannot be answered; where somebody is typing it is shown instead, and the talk goes on.
        KeyboardInterrupt: Ctrl-C was pressed while the next message was waited for.
    """
    while True:
        text = read_message(is_typed, f"{who_answers(dialogue)}> ")
        if text is None or text.strip() == "/quit":
            return
        try:
            if text.startswith("/"):
                note(obey(dialogue, text))
            elif text.strip():
                answer(dialogue, text)
        except QliteError as error:
            if not is_typed:
                raise
            note(str(error))
        except KeyboardInterrupt:  # in the moment before the first token or after the last one
            note("[stopped]")


def who_answers(dialogue: Dialogue) -> str:
    """Return the name of who answers, as far as there is a choice: the base model, or one of several adapters."""
    return "base" if dialogue.is_base else clean(dialogue.adapter or "", 40)


def read_message(is_typed: bool, prompt: str) -> str | None:
    """Return the next message, lines that end in a backslash joined to the next one; None at the end of the input."""
    lines: list[str] = []
    try:
        while not lines or lines[-1].endswith("\\"):
            lines.append(input(("... " if lines else prompt) if is_typed else ""))
    except (EOFError, KeyboardInterrupt) as error:
        if is_typed:
            print()  # the shell's prompt, or what is said next, begins on its own line
        if isinstance(error, KeyboardInterrupt):
            raise
        if not lines:
            return None
    return "\n".join(line.removesuffix("\\") for line in lines)


def answer(dialogue: Dialogue, text: str) -> None:
    """Stream the answer to ``text`` to standard output; what there is to say about it goes to standard error."""
    reply = dialogue.ask(text, write_answer)
    print(flush=True)
    for line in remarks(reply, dialogue):
        note(line)


def remarks(reply: Reply, dialogue: Dialogue) -> list[str]:
    """Return what is worth knowing about an answer: how it ended, what was forgotten for it, how fast it came."""
    lines = []
    if reply.is_interrupted:
        lines.append("[stopped; what was said is kept]" if reply.tokens else "[stopped before the first word; the message is not kept]")
    elif reply.is_cut:
        lines.append(f"[cut at {reply.tokens} tokens: {_why_cut(reply, dialogue)}]")
    if reply.left_out:
        oldest = "the oldest exchange" if reply.left_out == 1 else f"the {reply.left_out} oldest exchanges"
        lines.append(f"[forgotten, to stay within the model's {dialogue.limit} tokens of context: {oldest}]")
    of_limit = f" of {dialogue.limit}" if dialogue.limit else ""
    by_base = ", base model" if dialogue.is_base else ""
    return [*lines, f"[{speed_of(reply.tokens, reply.seconds)}, context {reply.context}{of_limit}{by_base}]"]


def _why_cut(reply: Reply, dialogue: Dialogue) -> str:
    return "the model's context is full" if reply.tokens < dialogue.sampling.max_tokens else "the model did not stop by itself"


def note(text: str) -> None:
    """Write ``text``, from wherever it comes, to standard error: dim on a terminal, so that only answers stand out."""
    shown = clean_lines(text)
    is_dim = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    print(f"\x1b[2m{shown}\x1b[0m" if is_dim else shown, file=sys.stderr, flush=True)


# Commands: each changes the dialogue and returns what there is to say about it.


def obey(dialogue: Dialogue, text: str) -> str:
    """Carry out the command that ``text`` begins with, and return what to tell the user."""
    name, rest = [*text.split(maxsplit=1), ""][:2]
    if name not in COMMANDS:
        return f'"{clean(name, 40)}": no such command; /help lists them. To say a line that begins with "/", put a space before it'
    if rest and name not in ("/system", "/adapter"):
        return f"{name} takes nothing after it"
    return COMMANDS[name][0](dialogue, rest.strip())


def _base(dialogue: Dialogue, _: str) -> str:
    return "adapter off: the base model answers" if dialogue.toggle_base() else "adapter on: the trained model answers"


def _reset(dialogue: Dialogue, _: str) -> str:
    dialogue.reset()
    return "the conversation is forgotten"


def _system(dialogue: Dialogue, text: str) -> str:
    dialogue.system = text
    dialogue.reset()
    return f"{'system message set' if text else 'no system message'}; the conversation is forgotten"


def _undo(dialogue: Dialogue, _: str) -> str:
    exchange = dialogue.undo()
    return f'taken back: "{clean(exchange.user, 60)}" and its answer' if exchange else "nothing has been said yet"


def _adapter(dialogue: Dialogue, name: str) -> str:
    if dialogue.voices is None:
        return "only one adapter was given; to have a choice, begin with --adapter NAME=FOLDER for each"
    names = ", ".join(clean(each, 40) for each in dialogue.voices.bank.names)
    if not name:
        return f"{who_answers(dialogue)} answers, of: {names}"
    has_other_system = dialogue.swap(name)
    told = f"{clean(name, 40)} answers"
    return f"{told}, under the system message that it was trained with: {dialogue.system or 'none'}" if has_other_system else told


def _help(_: Dialogue, __: str) -> str:
    lines = {**{name: text for name, (_, text) in COMMANDS.items()}, "/quit": "leave; so does Ctrl-D"}
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


COMMANDS: dict[str, tuple[Callable[[Dialogue, str], str], str]] = {
    "/base": (_base, "switch the adapter off, to hear the base model, or on again"),
    "/adapter": (_adapter, "NAME: let another of the adapters answer, in the same conversation (no NAME: list them)"),
    "/undo": (_undo, "take back the last message and its answer"),
    "/reset": (_reset, "forget the conversation"),
    "/system": (_system, "TEXT: set the system message (no TEXT: none) and forget the conversation"),
    "/help": (_help, "show this"),
}


if __name__ == "__main__":
    run_verb(main)
