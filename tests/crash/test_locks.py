"""Two runs in one folder: the second is told who is there, and no lock outlives its holder."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import tomli_w

from qlite.errors import RunError
from qlite.lock import held
from tests.crash.test_kills import ROOT
from tests.tiny_run import tiny_tables

pytestmark = pytest.mark.crash

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom qlite.errors import RunError\nfrom qlite.lock import held\n"
    "print('ready', flush=True)\nsys.stdin.readline()\n"
    "try:\n    with held(Path(sys.argv[1])):\n        print('mine', flush=True)\n        sys.stdin.readline()\n"
    "except RunError as error:\n    print(error, flush=True)\n    sys.exit(error.exit_code)\n"
)


def wait_for(is_there: Callable[[], bool]) -> None:
    for _ in range(600):
        if is_there():
            return
        time.sleep(0.05)


def start(folder) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_of_many_at_once_exactly_one_wins(tmp_path, tell):
    rounds, won = 20, 0
    for number in range(rounds):
        folder, done = tmp_path / f"run-{number}", tmp_path / f"done-{number}"
        together = time.time() + 0.3
        for _ in range(20):
            child = os.fork()
            if child == 0:
                time.sleep(max(0.0, together - time.time()))  # all at once
                code = 1
                try:
                    with held(folder):
                        wait_for(done.exists)
                    code = 0
                except RunError as error:
                    code = error.exit_code
                finally:
                    os._exit(code)
        codes = []
        for _ in range(20):
            if len(codes) == 19:
                done.touch()  # the one that is left has it
            _, status = os.wait()
            codes.append(os.waitstatus_to_exitcode(status))
        won += codes == [2] * 19 + [0]
        assert not folder.exists() or not list(folder.iterdir())  # empty, where it was made by one that came too late
    tell(f"20 processes at once in one folder: exactly one had it in {won}/{rounds} rounds")
    assert won == rounds


def test_a_lock_dies_with_its_holder(tmp_path):
    first = start(tmp_path / "run")
    first.stdin.write("\n")
    first.stdin.flush()
    assert [first.stdout.readline(), first.stdout.readline()] == ["ready\n", "mine\n"]
    with pytest.raises(RunError, match=f"process {first.pid} is training there"), held(tmp_path / "run"):
        pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / "run" / ".lock").exists()
    with held(tmp_path / "run"):
        pass


def test_the_second_command_ends_at_once_and_names_the_first(tmp_path, tell):
    changes = {"train": {"steps": 5000, "eval_every": 0, "exact_match_rows": 0}, "base": {"fused": False}}
    recipe = tmp_path / "mine.toml"
    recipe.write_text(tomli_w.dumps(tiny_tables(tmp_path, **changes)))
    variables = {**os.environ, "QLITE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "qlite.train", str(recipe)]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # whoever runs the tests may ignore it (nohup, &)
    first = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, **heard)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while first.poll() is None and not metrics.exists():
        time.sleep(0.05)
    timed = (
        "import sys, time\nfrom qlite.train import main\nfrom qlite.training.run import begin\nfrom qlite.verb import run_verb\n"
        "start = time.perf_counter()\ntry:\n    run_verb(main)\n"
        "finally:\n    print('seconds', time.perf_counter() - start)\n"
    )
    second = subprocess.run([sys.executable, "-c", timed, str(recipe)], cwd=ROOT, env=variables, text=True, capture_output=True)
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    assert second.returncode == 2
    assert f"process {first.pid} is training there" in second.stderr
    seconds = float(second.stdout.split()[-1])
    tell(f"a second run in a folder: exit 2, {seconds:.2f} s after its imports")
    assert seconds < 2
