"""A talk with a trained run, through a pipe and as somebody types it: every command, every way out, and what the model is asked."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlite import chat, generate
from qlite.data.encode import Encoder
from qlite.errors import DataError, RecipeError
from qlite.recipe.read import build_recipe
from qlite.serving import dialogue as dialogues
from qlite.serving.answer import Sampling, generate_ids
from qlite.serving.dialogue import Dialogue, Reply
from qlite.training.open_run import open_run
from qlite.training.run_folder import RunFolder
from qlite.verb import run_verb
from tests.tiny_run import run, tiny_recipe, tiny_tables

ROOT = Path(__file__).parents[1]
MAX_TOKENS = 8


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A shell's background jobs, these tests among them, are born deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run over a 4-bit base."""
    folder = tmp_path_factory.mktemp("chat")
    run(tiny_recipe(folder, train={"steps": 30}, optimizer={"lr": 2e-2}))
    return folder / "run"


@pytest.fixture(scope="module")
def trained(finished):
    """The run, opened with its adapter on."""
    opened = open_run(RunFolder(finished), "cpu", lambda *_: None)
    opened.attach()
    return opened


@pytest.fixture(scope="module")
def base(finished):
    """The run's base, on which no adapter ever was."""
    return open_run(RunFolder(finished), "cpu", lambda *_: None)


@pytest.fixture
def asked(monkeypatch) -> list[list[int]]:
    """The ids that every answer was asked with."""
    seen = []

    def spying(model, encoder, ids, *rest):
        seen.append(ids[0].tolist())
        return generate_ids(model, encoder, ids, *rest)

    monkeypatch.setattr(dialogues, "generate_ids", spying)
    return seen


def messages_of(*texts: str, system: str | None = None) -> list[dict]:
    """Return user and assistant speaking in turn."""
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def said(opened, *texts: str) -> str:
    """Return the greedy answer to the conversation ``texts``, from one call that starts from nothing."""
    ids = torch.tensor([opened.encoder.encode_prompt(messages_of(*texts))])
    new = generate_ids(opened.base.model, opened.encoder, ids, torch.ones_like(ids), Sampling(MAX_TOKENS))[0].tolist()
    return opened.encoder.decode([token for token in new if token not in opened.encoder.stop_ids])


class Piped:
    """Runs the chat over lines from a pipe; returns standard output and standard error."""

    def __init__(self, finished: Path, monkeypatch, capsys):
        self.finished, self.monkeypatch, self.capsys = finished, monkeypatch, capsys

    def __call__(self, *lines: str, options: tuple[str, ...] = ()) -> tuple[str, str]:
        self.monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        chat.main([str(self.finished), "--max-tokens", str(MAX_TOKENS), "--device", "cpu", *options])
        return self.capsys.readouterr()


class Typed(Piped):
    """Runs the chat as if somebody typed ``lines``, an exception among them being a key (Ctrl-D, Ctrl-C); remembers the prompts."""

    def __call__(self, *lines, options: tuple[str, ...] = ()) -> tuple[str, str]:
        self.prompts: list[str] = []
        keys = iter(lines)

        def typing(prompt: str) -> str:
            self.prompts.append(prompt)
            line = next(keys)
            if isinstance(line, str):
                return line
            raise line

        terminal = io.StringIO()
        terminal.isatty = lambda: True
        self.monkeypatch.setattr(sys, "stdin", terminal)
        self.monkeypatch.setattr("builtins.input", typing)
        chat.main([str(self.finished), "--max-tokens", str(MAX_TOKENS), "--device", "cpu", *options])
        return self.capsys.readouterr()


@pytest.fixture
def piped(finished, monkeypatch, capsys) -> Piped:
    return Piped(finished, monkeypatch, capsys)


@pytest.fixture
def typed(finished, monkeypatch, capsys) -> Typed:
    return Typed(finished, monkeypatch, capsys)


def test_each_line_of_a_pipe_is_a_turn_with_all_before_it_as_history(piped, trained, asked):
    first = said(trained, "abc")
    second = said(trained, "abc", first, "fade")
    out, err = piped("abc", "fade")
    assert out == f"{first}\n{second}\n"
    encode = trained.encoder.encode_prompt
    assert asked == [encode(messages_of("abc")), encode(messages_of("abc", first, "fade"))]
    assert err.count("tokens/s, context") == 2
    assert ">" not in err


def test_empty_lines_are_no_turns(piped, asked):
    piped("", "   ", "abc", "")
    assert len(asked) == 1


def test_a_line_that_ends_in_a_backslash_goes_on_in_the_next(piped, trained, asked):
    piped("abc\\", "de\\", "f", "be\\")
    answer = said(trained, "abc\nde\nf")
    assert asked[0] == trained.encoder.encode_prompt(messages_of("abc\nde\nf"))
    assert asked[1] == trained.encoder.encode_prompt(messages_of("abc\nde\nf", answer, "be"))


def test_base_switches_the_adapter_off_and_on_and_says_so(piped, trained, base):
    tuned = said(trained, "abc")
    off = said(base, "abc", tuned, "fade")
    on = said(trained, "abc", tuned, "fade", off, "be")
    out, err = piped("abc", "/base", "fade", "/base", "be")
    assert out == f"{tuned}\n{off}\n{on}\n"
    assert off != said(trained, "abc", tuned, "fade")
    lines = [line for line in err.splitlines() if not line.startswith("[cut")]
    assert lines[1] == "adapter off: the base model answers"
    assert lines[3] == "adapter on: the trained model answers"
    assert [line.endswith(", base model]") for line in lines if "tokens/s" in line] == [False, True, False]


def test_reset_forgets_what_was_said(piped, trained, asked):
    _, err = piped("abc", "/reset", "fade")
    assert asked[1] == trained.encoder.encode_prompt(messages_of("fade"))
    assert "the conversation is forgotten" in err


def test_system_sets_the_system_message_and_forgets_what_was_said(piped, trained, asked):
    _, err = piped("abc", "/system Say it backwards. ", "fade", "/system", "be")
    encode = trained.encoder.encode_prompt
    assert asked[1] == encode(messages_of("fade", system="Say it backwards."))
    assert asked[2] == encode(messages_of("be"))
    assert "system message set; the conversation is forgotten" in err
    assert "no system message; the conversation is forgotten" in err


def test_the_system_message_of_the_command_line_is_sent_and_survives_a_reset(piped, trained, asked):
    piped("abc", "/reset", "fade", options=("--system", "Be brief."))
    assert asked == [trained.encoder.encode_prompt(messages_of(word, system="Be brief.")) for word in ("abc", "fade")]


def test_undo_takes_back_the_last_exchange(piped, trained, asked):
    first = said(trained, "abc")
    _, err = piped("/undo", "abc", "fade", "/undo", "be")
    assert asked[2] == trained.encoder.encode_prompt(messages_of("abc", first, "be"))
    assert err.startswith("nothing has been said yet\n")
    assert 'taken back: "fade" and its answer' in err


def test_help_names_every_command(piped):
    out, err = piped("/help")
    assert out == ""
    assert [line.split()[0] for line in err.splitlines()] == ["/base", "/adapter", "/undo", "/reset", "/system", "/help", "/quit"]


def test_a_mistyped_command_is_not_sent_to_the_model(piped, asked):
    _, err = piped("/bass", "/reset now", "/\x1b[2Jhome")
    assert asked == []
    lines = err.splitlines()
    assert lines[0] == '"/bass": no such command; /help lists them. To say a line that begins with "/", put a space before it'
    assert lines[1] == "/reset takes nothing after it"
    assert lines[2].startswith('"/home": no such command')


def test_a_line_that_begins_with_a_space_and_a_slash_is_said(piped, trained, asked):
    piped(" /abc")
    assert asked == [trained.encoder.encode_prompt(messages_of(" /abc"))]


def test_after_quit_nothing_is_read(piped, asked):
    piped("abc", "/quit", "fade")
    assert len(asked) == 1


def test_an_answer_that_did_not_end_by_itself_is_called_cut(piped):
    _, err = piped("abcdef", options=("--max-tokens", "2"))
    assert err.startswith("[cut at 2 tokens: the model did not stop by itself]\n[2 tokens, ")


def test_an_answer_ends_at_a_stop_token_and_is_not_called_cut(piped, base, monkeypatch):
    free = base.encoder.tokenizer.encode(said(base, "abcdef"))
    length = next(i for i in range(1, len(free)) if free[i] not in free[:i])
    monkeypatch.setattr(Encoder, "stop_ids", [free[length]])
    out, err = piped("/base", "abcdef")
    assert out == base.encoder.decode(free[:length]) + "\n"
    assert err.splitlines()[1].startswith(f"[{length + 1} tokens, ")


def test_a_model_that_stops_at_once_has_answered_nothing_and_the_talk_goes_on(piped, base, asked, monkeypatch):
    first = base.encoder.tokenizer.encode(said(base, "abcdef"))[0]
    monkeypatch.setattr(Encoder, "stop_ids", [first])
    out, err = piped("/base", "abcdef", "fade")
    assert out.startswith("\n")
    assert err.splitlines()[1].startswith("[1 token, ")
    assert asked[1] == base.encoder.encode_prompt(messages_of("abcdef", "", "fade"))


def test_what_user_and_model_say_cannot_steer_the_terminal(piped, monkeypatch, capsys):
    out, err = piped("ab\x1b[2Jc\x07", "/undo")
    assert not {"\x1b", "\x07"} & set(out + err)
    assert 'taken back: "abc" and its answer' in err
    chat.write_answer("one\x1b[2J\n\ttwo\x07")
    chat.note("\x1b]0;title\x07three")
    assert capsys.readouterr() == ("one\n\ttwo", "three\n")


def test_typed_it_prompts_says_what_it_loads_and_leaves_at_ctrl_d(typed, trained):
    out, err = typed("abc", "/base", "fa\\", "de", "/base", EOFError())
    assert typed.prompts == ["> ", "> ", "base> ", "... ", "base> ", "> "]
    assert out.startswith(said(trained, "abc") + "\n")
    assert out.endswith("\n\n")  # the shell goes on in a new line
    assert err.splitlines()[:3] == [
        f"loading {typed.finished} ...",
        "no system message",
        "/help lists the commands; Ctrl-C stops an answer; Ctrl-D leaves",
    ]


def test_ctrl_d_and_quit_leave_with_0_and_ctrl_c_at_the_prompt_with_130(typed):
    for keys in ([EOFError()], ["abc", EOFError()], ["abc\\", EOFError(), EOFError()], ["/quit"]):
        run_verb(lambda _, keys=keys: typed(*keys))  # returns, so Python ends with 0
    for keys in ([KeyboardInterrupt()], ["abc", KeyboardInterrupt()], ["abc\\", KeyboardInterrupt()]):
        with pytest.raises(SystemExit) as leaving:
            run_verb(lambda _, keys=keys: typed(*keys))
        assert leaving.value.code == 130


def test_ctrl_c_stops_the_answer_alone_and_what_was_said_is_kept(typed, trained, asked, monkeypatch):
    pieces = []

    def write_and_press(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "write_answer", write_and_press)
    _, err = typed("abcdef", "fade", EOFError())
    kept = said(trained, "abcdef")[:2]
    assert "".join(pieces).startswith(kept)
    assert asked[1] == trained.encoder.encode_prompt(messages_of("abcdef", kept, "fade"))
    assert "[stopped; what was said is kept]" in err


def test_ctrl_c_before_the_first_word_keeps_nothing(typed, trained, asked, monkeypatch):
    waiting = [True]

    def pressed(*arguments):
        if waiting and waiting.pop():
            signal.raise_signal(signal.SIGINT)
        asked.append(arguments[2][0].tolist())
        return generate_ids(*arguments)

    monkeypatch.setattr(dialogues, "generate_ids", pressed)
    _, err = typed("abcdef", "fade", EOFError())
    assert asked == [trained.encoder.encode_prompt(messages_of("fade"))]
    assert "[stopped before the first word; the message is not kept]" in err


@pytest.mark.parametrize("moment", ["messages", "undo"])
def test_ctrl_c_just_before_or_after_an_answer_ends_no_talk(typed, moment, asked, monkeypatch):
    monkeypatch.setattr(Dialogue, moment, lambda *_: signal.raise_signal(signal.SIGINT))
    _, err = typed("abc" if moment == "messages" else "/undo", "/help", EOFError())
    assert "[stopped]\n/base" in err
    assert asked == []


def test_a_message_that_cannot_be_answered_ends_a_pipe_and_not_a_talk(piped, typed, asked):
    too_long = "a" * 3000
    with pytest.raises(DataError, match="this model reads at most 2048: shorten it"):
        piped(too_long, "abc")
    assert asked == []
    _, err = typed(too_long, "abc", EOFError())
    assert "this model reads at most 2048: shorten it" in err
    assert len(asked) == 1


def test_a_run_that_is_none_ends_with_its_message_and_exit_code_2(capsys, tmp_path):
    with pytest.raises(SystemExit) as leaving:
        run_verb(lambda _: chat.main([str(tmp_path)]))
    assert leaving.value.code == 2
    assert f'"{tmp_path}" is no run folder' in capsys.readouterr().err


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """A finished run over raw text; the tokenizer has a chat template all the same."""
    folder = tmp_path_factory.mktemp("raw")
    recipe = tiny_tables(folder)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": "abcdef " * n}) + "\n" for n in range(1, 9)))
    recipe["data"] = {"train": str(folder / "texts.jsonl")}
    recipe["train"] = {"steps": 2, "tokens": 64, "samples": ["abc"]}
    run(build_recipe(recipe, "raw.toml"))
    return folder / "run"


def test_a_run_trained_on_raw_text_is_asked_as_it_was_trained(raw, asked, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\nfade\n"))
    chat.main([str(raw), "--device", "cpu", "--max-tokens", "4"])
    assert capsys.readouterr().err.startswith("this run was trained on raw text: each message is continued by itself")
    tokenizer = open_run(RunFolder(raw), "cpu", lambda *_: None).base.tokenizer
    assert asked == [tokenizer(word)["input_ids"] for word in ("abc", "fade")]
    assert tokenizer.chat_template  # what an export would carry is the tokenizer's own
    with pytest.raises(DataError, match="trained on raw text, in which nobody is told anything"):
        generate.main([str(raw), "--prompt", "abc", "--system", "Be brief.", "--device", "cpu"])


def test_an_empty_prompt_is_refused(raw):
    with pytest.raises(DataError, match="the prompt is empty"):
        generate.main([str(raw), "--prompt", "", "--device", "cpu"])


def test_a_number_that_makes_no_sense_is_refused_before_anything_is_loaded(finished, monkeypatch):
    monkeypatch.setattr(generate, "open_run", lambda *_: pytest.fail("loaded"))
    with pytest.raises(RecipeError, match="temperature -1"):
        chat.main([str(finished), "--temperature", "-1"])


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, ["[10 tokens, 5.0 tokens/s, context 30 of 2048]"]),
        ({"is_cut": True}, ["[cut at 10 tokens: the model's context is full]", "[10 tokens, 5.0 tokens/s, context 30 of 2048]"]),
        (
            {"left_out": 1},
            [
                "[forgotten, to stay within the model's 2048 tokens of context: the oldest exchange]",
                "[10 tokens, 5.0 tokens/s, context 30 of 2048]",
            ],
        ),
        (
            {"left_out": 2, "is_interrupted": True},
            [
                "[stopped; what was said is kept]",
                "[forgotten, to stay within the model's 2048 tokens of context: the 2 oldest exchanges]",
                "[10 tokens, 5.0 tokens/s, context 30 of 2048]",
            ],
        ),
    ],
)
def test_what_is_remarked_after_an_answer(trained, changes, lines):
    facts = {"tokens": 10, "seconds": 2.0, "context": 30, "left_out": 0, "is_cut": False, "is_interrupted": False, **changes}
    talk = Dialogue(trained.base.model, trained.encoder, Sampling(max_tokens=512), None)
    assert chat.remarks(Reply(text="", **facts), talk) == lines


def test_notes_are_dim_on_a_terminal_that_can_be_dim_and_wants_to(monkeypatch):
    for facts, shown in (({}, "\x1b[2mone\x1b[0m\n"), ({"TERM": "dumb"}, "one\n"), ({"NO_COLOR": "1"}, "one\n")):
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stderr", terminal)
        for name in ("TERM", "NO_COLOR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in facts.items():
            monkeypatch.setenv(name, value)
        chat.note("one")
        assert terminal.getvalue() == shown


def test_generate_leaves_at_ctrl_c(finished, monkeypatch):
    monkeypatch.setattr(generate, "write_answer", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        generate.main([str(finished), "--prompt", "abc", "--device", "cpu"])


def test_a_real_pipe_gets_the_answers_and_exit_code_0_bad_bytes_or_not(finished, trained):
    command = [sys.executable, "-m", "qlite.chat", str(finished), "--device", "cpu", "--max-tokens", str(MAX_TOKENS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    done = subprocess.run(command, input=b"abc\n\xff\xfe\n/quit\nfade\n", capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    first = said(trained, "abc")
    second = said(trained, "abc", first, "\ufffd\ufffd")
    assert done.stdout.decode() == f"{first}\n{second}\n"
    assert b"Traceback" not in done.stderr
