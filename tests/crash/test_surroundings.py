"""Terminals that vanish, pipes that nobody reads, folders that cannot be written: a run ends well or with one message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from tests.crash.test_kills import ROOT, SHORT, fresh, sums
from tests.tiny_run import tiny_tables

pytestmark = pytest.mark.crash

HARMLESS = {
    "stdout is a pipe that nobody reads": {"stdout": "pipe"},
    "stdout is a full disk": {"stdout": "full"},
    "stdout is closed": {"stdout": "none"},
    "stderr is a full disk": {"stderr": "full"},
    "stdout and stderr are closed": {"stdout": "none", "stderr": "none"},
    "a terminal of 40 columns": {"stdout": "terminal", "env": {"TERM": "xterm", "COLUMNS": None}},
    "a terminal that can do nothing": {"stdout": "terminal", "env": {"TERM": "dumb"}},
    "no TERM": {"stdout": "terminal", "env": {"TERM": None}},
    "an ASCII locale": {"env": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}},
    "no HOME": {"env": {"HOME": None, "USER": None, "LOGNAME": None}},
}
REFUSED = {
    "output.dir cannot be made": ({"output": {"dir": "/proc/nobody/run"}}, 3, "cannot write"),
    "output.dir is a file": ({"output": {"dir": "{folder}/file"}}, 2, "file"),
    "output.dir is in a file": ({"output": {"dir": "{folder}/file/run"}}, 3, "cannot write"),
}


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert server(folder, SHORT)["code"] == 0
    return folder


def typed(folder: Path, changes: dict) -> list[str]:
    """Write a recipe and return the command line's arguments."""
    recipe = folder / "mine.toml"
    recipe.write_text(tomli_w.dumps(tiny_tables(folder, **{**SHORT, **changes})))
    return [str(recipe)]


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_around_a_run_changes_nothing_of_it(server, whole, tmp_path, name):
    folder, job = fresh(whole, tmp_path / "victim"), HARMLESS[name]
    ended = server(folder, SHORT, argv=typed(folder, {}), **job)
    assert ended.get("code") == 0, (folder / "stderr").read_text() if (folder / "stderr").exists() else ended
    assert sums(folder) == sums(whole)
    if job.get("stdout") == "terminal":
        assert (folder / "stdout").stat().st_size > 200


@pytest.mark.parametrize("name", REFUSED)
def test_folders_that_cannot_be_written_are_named(server, whole, tmp_path, name):
    folder = fresh(whole, tmp_path / "victim")
    (folder / "file").write_text("mine")
    changes, code, words = REFUSED[name]
    path = changes["output"]["dir"].format(folder=folder)
    ended = server(folder, SHORT, argv=typed(folder, {"output": {**SHORT["output"], "dir": path}}))
    message = (folder / "stderr").read_text()
    assert (ended.get("code"), message.count("\n")) == (code, 1), message
    assert words in message
    assert (folder / "file").read_text() == "mine"


def test_a_folder_that_is_gone_is_said(server, whole, tmp_path):
    folder = fresh(whole, tmp_path / "victim")
    ended = server(folder, SHORT, argv=typed(folder, {}), cwd=str(folder / "gone"))
    assert (ended["code"], (folder / "stderr").read_text().count("\n")) == (3, 1)
    assert "no longer there" in (folder / "stderr").read_text()


def test_a_long_run_holds_no_more_at_its_end_than_at_its_start(server, tmp_path, tell):
    steps = 2000
    changes = {
        "base": {"bits": 16},
        "method": {"rank": 1, "targets": ["q_proj"]},
        "train": {"steps": steps, "micro_batch": 1, "accumulation": 1, "eval_every": 500, "exact_match_rows": 0},
        "output": {"save_every": 250, "keep": 2},
    }
    folder = tmp_path / "long"
    folder.mkdir()
    assert server(folder, changes, held=str(folder / "held"))["code"] == 0
    held = json.loads((folder / "held").read_text())
    early, late = next(row for row in held if row[0] == 400), held[-1]
    assert late[0] == steps
    growth = late[1] / early[1] - 1
    tell(f"{steps} steps: resident memory {growth:+.1%} from step 400 to the last, open files {early[2]} and {late[2]}")
    assert growth < 0.02
    assert late[2] <= early[2]


def test_a_mistake_of_our_own_is_one_line_with_a_report(server, whole, tmp_path):
    folder = fresh(whole, tmp_path / "victim")
    argv = typed(folder, {})
    # Nothing in qlite expects this of a clock.
    ended = server(folder, SHORT, argv=argv, env={"QLITE_CACHE": str(folder / "cache")}, broken="perf_counter")
    message = (folder / "stderr").read_text()
    assert ended["code"] == 1
    assert message.startswith("this is a mistake of qlite's own (RuntimeError: no clock); where it happened is in ")
    assert message.count("\n") == 1
    (report,) = (folder / "cache" / "reports").glob("*.txt")
    assert "Traceback" in report.read_text()
    assert "no clock" in report.read_text()
    assert os.fspath(report) in message


def test_two_processes_with_one_seed_compute_the_same_bytes(tmp_path, tell):
    """Other hash seed, working folder and locale."""
    changes, found = {**SHORT, "base": {"fused": False}}, []
    for name, env in (("one", {"PYTHONHASHSEED": "1"}), ("two", {"PYTHONHASHSEED": "777", "LC_ALL": "C", "TZ": "Asia/Tokyo"})):
        folder = tmp_path / name
        folder.mkdir()
        recipe = folder / "mine.toml"
        recipe.write_text(tomli_w.dumps(tiny_tables(folder, **changes)))
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "QLITE_CACHE": str(folder / "cache"), **env}
        subprocess.run([sys.executable, "-m", "qlite.train", str(recipe)], cwd=folder, env=variables, check=True, capture_output=True)
        found.append(sums(folder))
    tell("two processes, other hash seed, folder, locale and cache: the same bytes")
    assert found[0] == found[1]


EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m[red][/]\u202egpj.exe\x00" + "x" * 10_000
STEERING = {"\x1b", "\x9b", "\x07", "\x00", "\u202e"}


def test_strangers_texts_do_not_steer_the_terminal(server, whole, tmp_path):
    """In rows, prompts, names of files and of keys: on the screen, in plain lines and in messages there is no raw escape."""
    folder = fresh(whole, tmp_path / "victim")
    for part in ("train.jsonl", "test.jsonl"):
        (folder / part).unlink()
        (folder / part).write_text("".join(json.dumps({"prompt": EVIL[:60] + str(n), "completion": EVIL[:40]}) + "\n" for n in range(9)))
    train = {**SHORT["train"], "tokens": 256, "samples": [EVIL[:60]], "exact_match_rows": 2}
    argv = typed(
        folder, {"train": train, "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "allow": ["control"]}}
    )
    ended = server(folder, SHORT, argv=argv)
    shown = (folder / "stdout").read_text(encoding="utf-8")
    assert ended["code"] == 0, (folder / "stderr").read_text()
    assert not set(shown) & STEERING
    assert "[red][/]" in shown  # shown as it is, and no markup of ours
    for argument in (f"train.{EVIL[:80]}=1", f"data.train={EVIL[:80].replace(chr(0), '')}", f"base.model={EVIL[:90].replace(chr(0), '')}"):
        ended = server(folder, SHORT, argv=[*argv, argument, f"output.dir={folder / 'other'}"])
        message = (folder / "stderr").read_text(encoding="utf-8")
        assert ended["code"] == 2, message
        assert not set(message) & STEERING
        assert len(message) < 3000
