"""A process that has imported torch once and forks victims: each trains a tiny run under faults, in well under a second.

python -m tests.crash.victims    reads jobs as JSON lines, answers each with how its victim ended
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from qlite.cpu_products import multiply_in_float32
from qlite.errors import QliteError
from qlite.files import held
from qlite.model import load
from qlite.stopping import Stopped, stopping_at_once
from qlite.training.run import train
from qlite.training.run_folder import RunFolder
from tests.crash.faults import Faults
from tests.tiny_run import tiny_recipe, tiny_tables


class Listening:
    """An observer that wakes ``faults`` after step ``since``, and tells when the first step is done."""

    def __init__(self, faults: Faults, since: int, told: Path):
        self.faults, self.since, self.told = faults, since, told
        self.faults.is_awake = since < 0

    def note(self, message: str) -> None:
        with open(self.told, "a", encoding="utf-8") as file:
            file.write(json.dumps(message) + "\n")

    def phase(self, name: str, done: int, total: int) -> None: ...

    def step(self, report) -> None:
        self.faults.is_awake = report.step >= self.since

    def evaluated(self, report) -> None: ...

    def answered(self, report) -> None: ...

    def sampled(self, report) -> None: ...


def victim(job: dict, faulty: bool = True) -> int:
    """Train as ``job`` says; return the exit code that a verb would have."""
    folder = Path(job["folder"])
    recipe = tiny_recipe(folder, **job["changes"])
    faults = Faults(str(folder / "run"), **job.get("faults", {}))
    watching = Listening(faults, job.get("since", -1), folder / "told")
    if faulty:
        faults.install()
    run = RunFolder(Path(recipe.output.dir))
    try:
        with stopping_at_once(), held(run.path):
            if not run.is_finished:
                train(recipe, run, watching)
        return 0
    except QliteError as error:
        watching.note(str(error))
        return error.exit_code
    except Stopped as stopped:
        return stopped.exit_code
    finally:
        if "log" in job:
            Path(job["log"]).write_text(json.dumps(faults.log), encoding="utf-8")


def forked(job: dict) -> dict:
    """Run a victim to its end, and return how it ended: {"code": 3}, {"signal": 9}."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            quiet = os.open(job.get("stderr", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            code = victim(job)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    timers = [threading.Timer(delay, _kill, (child, number)) for number, delay in job.get("signals", [])]
    for timer in timers:
        timer.start()
    started = time.perf_counter()
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - started
    for timer in timers:
        timer.cancel()
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status), "seconds": seconds}
    return {"code": os.WEXITSTATUS(status), "seconds": seconds}


def _kill(child: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(child, number)


def main() -> None:
    multiply_in_float32()
    load.compile_kernels = load.compile_quantiser = lambda *_: None  # seconds, for models that take milliseconds
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:  # what is imported and read here need not be by every victim
        tiny_tables(Path(folder))
        victim({"folder": folder, "changes": {}}, faulty=False)
    for line in sys.stdin:
        print(json.dumps(forked(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
