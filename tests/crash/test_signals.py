"""Ctrl-C, a shutdown and a closing terminal: a checkpoint at the next micro-batch, the right exit code, and then the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

from qlite.files import is_whole
from qlite.stopping import Stopped
from qlite.training.run import train
from qlite.training.run_folder import RunFolder
from tests.crash.test_kills import ROOT, fresh, sums
from tests.tiny_run import Watcher, tiny_recipe, tiny_tables

pytestmark = pytest.mark.crash

LONG = {
    "train": {"steps": 12, "accumulation": 2, "eval_every": 5, "exact_match_rows": 2, "samples": ["abc"]},
    "output": {"save_every": 10, "keep": 1, "adapter": "best"},
}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> tuple[Path, float]:
    """A run that nothing has happened to, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("whole")
    ended = server(folder, LONG)
    assert ended["code"] == 0
    return folder, ended["seconds"]


@pytest.mark.parametrize("rounds", [12, pytest.param(50, marks=pytest.mark.nightly)])
def test_a_signal_at_any_time_ends_with_its_code_and_loses_nothing(server, whole, tmp_path, tell, rounds):
    base, seconds = whole
    chance, good, slowest = random.Random(rounds), 0, 0.0
    for number in range(rounds):
        folder = fresh(base, tmp_path / "victim")
        name = list(CODES)[number % len(CODES)]
        delay = chance.uniform(0.05, 0.9 * seconds)
        ended = server(folder, LONG, signals=[[name, delay]])
        assert ended.get("code") in (CODES[name], 0), ended
        slowest = max(slowest, ended["seconds"] - delay) if ended["code"] else slowest
        run = RunFolder(folder / "run")
        steps = [record["step"] for record in run.records.read() if record["kind"] == "step"]
        if steps and ended["code"]:
            saved = max(int(path.name[5:13]) for path in (folder / "run" / "checkpoints").glob("step-*") if is_whole(path))
            assert saved == max(steps), "a step was made and is in no checkpoint"
        assert server(folder, LONG)["code"] == 0
        good += sums(folder) == sums(base)
    tell(f"signals at random times: {good}/{rounds} runs wrote all they had learned and ended with the same bytes; {slowest:.1f} s at most")
    assert good == rounds
    assert slowest < 10


def test_the_second_signal_stops_at_once_and_harms_nothing(server, whole, tmp_path, tell):
    base, seconds = whole
    chance, rounds = random.Random(1), 6
    for _ in range(rounds):
        folder = fresh(base, tmp_path / "victim")
        delay = chance.uniform(0.2, 0.9) * seconds
        ended = server(folder, LONG, signals=[[signal.SIGINT, delay], [signal.SIGINT, delay + chance.uniform(0, 0.03)]])
        assert ended.get("code") in (130, 0), ended
        assert not list(folder.rglob(".*.tmp-*"))
        assert server(folder, LONG)["code"] == 0
        assert sums(folder) == sums(base)
    tell(f"two signals in a row: {rounds}/{rounds} runs stopped, unharmed")


@pytest.mark.parametrize("name", CODES)
def test_the_command_that_a_user_types(tmp_path, name):
    tables = tiny_tables(tmp_path, train={"steps": 5000, "eval_every": 0, "exact_match_rows": 0}, base={"fused": False})
    recipe = tmp_path / "mine.toml"
    recipe.write_text(tomli_w.dumps(tables))
    variables = {**os.environ, "QLITE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "qlite.train", str(recipe)]
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Whoever runs the tests may ignore the signal (nohup, &), and what it starts would, too.
    process = subprocess.Popen(command, cwd=ROOT, env=variables, preexec_fn=lambda: signal.signal(name, signal.SIG_DFL), **pipes)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step"' in metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(name)
    out, err = process.communicate(timeout=60)
    assert process.returncode == CODES[name]
    assert f"{name.name}: stopping after this micro-batch, with a checkpoint of the last whole step" in out
    assert err.strip() == "interrupted; the same command goes on from the newest checkpoint, if one was written"
    assert f"stopped by {signal.Signals(name).name} after step" in out
    assert RunFolder(tmp_path / "run").newest is not None


def test_a_closing_terminal_that_says_it_twice_loses_nothing(server, whole, tmp_path):
    """The shell and the kernel both send SIGHUP; a shutdown sends SIGTERM, too."""
    base, seconds = whole
    for numbers in ([signal.SIGHUP, signal.SIGHUP], [signal.SIGTERM, signal.SIGHUP], [signal.SIGINT, signal.SIGTERM]):
        folder = fresh(base, tmp_path / "victim")
        delay = 0.6 * seconds
        ended = server(folder, LONG, signals=[[number, delay + 0.001 * place] for place, number in enumerate(numbers)])
        # Either's code: of two that are there when Python looks, it hears the one of the lower number first.
        assert ended.get("code") in (*map(CODES.get, numbers), 0), ended
        steps = [record["step"] for record in RunFolder(folder / "run").records.read() if record["kind"] == "step"]
        saved = [int(path.name[5:13]) for path in (folder / "run" / "checkpoints").glob("step-*") if is_whole(path)]
        assert max(saved, default=0) == max(steps, default=0)  # on a busy machine it may have come before the first step
        assert server(folder, LONG)["code"] == 0
        assert sums(folder) == sums(base)


def test_a_signal_in_the_last_step_is_heard(tmp_path):
    class Last(Watcher):
        def step(self, report) -> None:
            if report.step == report.steps:
                os.kill(os.getpid(), signal.SIGTERM)

    recipe = tiny_recipe(tmp_path, train={"steps": 2, "exact_match_rows": 0})
    with pytest.raises(Stopped) as caught:
        train(recipe, RunFolder(tmp_path / "run"), Last())
    assert caught.value.exit_code == 143
    assert RunFolder(tmp_path / "run").newest.name == "step-00000002-unevaluated"
    train(recipe, RunFolder(tmp_path / "run"), Watcher())
    assert RunFolder(tmp_path / "run").is_finished


@pytest.mark.parametrize("changes", [{}, {"patience": 1, "eval_every": 1}])
def test_a_signal_in_the_last_evaluation_is_made_good(tmp_path, changes):
    """What is written then lacks the evaluation; what is written once it is made takes its place."""

    class Last(Watcher):
        def phase(self, name: str, done: int, total: int) -> None:
            if name == "evaluate" and self.steps and self.steps[-1].step == last:
                os.kill(os.getpid(), signal.SIGTERM)

    folders = [tmp_path / name for name in ("whole", "stopped")]
    plan = {"steps": 6, "eval_every": 2, "exact_match_rows": 0, "accumulation": 1, **changes}
    recipes = []
    for folder in folders:
        folder.mkdir()
        recipes.append(tiny_recipe(folder, train=plan, output={"save_every": 2, "keep": 1, "adapter": "best"}, optimizer={"lr": 3.0}))
    train(recipes[0], RunFolder(folders[0] / "run"), seen := Watcher())
    last = seen.steps[-1].step
    run = RunFolder(folders[1] / "run")
    with pytest.raises(Stopped):
        train(recipes[1], run, Last())
    assert run.newest.name == f"step-{last:08d}-unevaluated"
    train(recipes[1], run, Watcher())
    assert run.newest.name == f"step-{last:08d}"
    assert sums(folders[1]) == sums(folders[0])
    assert (last < 6) == bool(changes)


def test_what_is_ignored_from_outside_stays_ignored(tmp_path):
    """``nohup``: a closing terminal is no reason to stop."""
    code = (
        "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from qlite.stopping import stopping_softly\n"
        "with stopping_softly() as stop:\n    os.kill(os.getpid(), signal.SIGHUP)\n    stop.check()\nprint('goes on')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "goes on\n", done.stderr
