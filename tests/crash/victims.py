"""A process that has imported torch once and forks victims: each trains a tiny run under faults, in well under a second.

python -m tests.crash.victims    reads jobs as JSON lines, answers each with how its victim ended
"""

import contextlib
import importlib
import json
import os
import pty
import signal
import sys
import tempfile
import termios
import threading
import time
import traceback
from pathlib import Path

import psutil

from qlite import export
from qlite.cpu_products import multiply_in_float32
from qlite.errors import QliteError
from qlite.lock import held
from qlite.model import load
from qlite.stopping import Stopped, stopping_at_once
from qlite.training.run import train
from qlite.training.run_folder import RunFolder
from qlite.verb import run_verb
from tests.crash.faults import Faults
from tests.tiny_run import tiny_recipe, tiny_tables

NAMES = {"stdout": 1, "stderr": 2}


class Listening:
    """An observer that wakes ``faults`` after step ``since``, and tells when the first step is done."""

    def __init__(self, faults: Faults, since: int, told: Path):
        self.faults, self.since, self.told = faults, since, told
        self.faults.is_awake = since < 0
        self.held: list[tuple[int, int, int]] = []
        """Step, resident bytes, open files: every 100 steps."""

    def note(self, message: str) -> None:
        with open(self.told, "a", encoding="utf-8") as file:
            file.write(json.dumps(message) + "\n")

    def phase(self, name: str, done: int, total: int) -> None: ...

    def step(self, report) -> None:
        self.faults.is_awake = report.step >= self.since
        if report.step % 100 == 0:
            self.held.append((report.step, psutil.Process().memory_info().rss, psutil.Process().num_fds()))

    def evaluated(self, report) -> None: ...

    def answered(self, report) -> None: ...

    def sampled(self, report) -> None: ...


def victim(job: dict, faulty: bool = True) -> int:
    """Train as ``job`` says; return the exit code that a verb would have."""
    folder = Path(job["folder"])
    recipe = tiny_recipe(folder, **job["changes"])
    faults = Faults(str(folder / job.get("inside", "run")), **job.get("faults", {}))
    watching = Listening(faults, job.get("since", -1), folder / "told")
    if faulty:
        faults.install()
    run = RunFolder(Path(recipe.output.dir))
    try:
        with stopping_at_once():
            if "export" in job:
                faults.is_awake = True
                what = job.get("what", ["--merge", "--dtype", "fp32"])
                export.main([str(run.path), *what, "--out", job["export"], *job.get("options", [])])
                return 0
            with held(run.path):
                if not run.is_finished and not job.get("fresh"):
                    train(recipe, run, watching)
                elif job.get("fresh"):
                    train(recipe, run, watching, fresh=True)
        return 0
    except QliteError as error:
        watching.note(str(error))
        return error.exit_code
    except Stopped as stopped:
        return stopped.exit_code
    finally:
        if "held" in job:
            Path(job["held"]).write_text(json.dumps(watching.held), encoding="utf-8")
        if "log" in job:
            Path(job["log"]).write_text(json.dumps(faults.log), encoding="utf-8")


def verb(job: dict) -> int:
    """Type ``python -m qlite.train ARGV`` with other surroundings; return the exit code."""
    for name, value in job.get("env", {}).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    for name, handle in NAMES.items():
        _connect(handle, job.get(name, "file"), f"{job['folder']}/{name}")
    streams = {name: os.fdopen(handle, "w", closefd=False) for name, handle in NAMES.items() if job.get(name) != "none"}
    sys.stdout, sys.stderr = streams.get("stdout"), streams.get("stderr")
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    if "cwd" in job:
        os.makedirs(job["cwd"])
        os.chdir(job["cwd"])
        os.rmdir(job["cwd"])
    if "broken" in job:
        setattr(time, job["broken"], _broken)
    name = f"qlite.{job.get('verb', 'train')}"
    sys.argv, main = [name, *job["argv"]], importlib.import_module(name).main
    if "audit" in job:
        _audit(job["audit"])
    try:
        run_verb(main)
    except SystemExit as exit:
        return exit.code or 0
    return 0


def _audit(file: str) -> None:
    """Write what the process opens, whom it connects to and what it starts into ``file``, a JSON line each."""
    log = os.open(file, os.O_WRONLY | os.O_CREAT)

    def heard(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str | bytes):
            is_write = bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            told = ["write" if is_write else "read", os.path.abspath(os.fsdecode(args[0]))]
        elif event.partition(".")[0] in ("socket", "subprocess", "urllib", "ftplib", "http", "smtplib", "pty", "webbrowser"):
            told = ["talk", event]
        elif event in (
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
            "os.forkpty",
            "os.startfile",
            "pickle.find_class",
        ):
            told = ["run", event]
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.symlink", "shutil.rmtree", "os.truncate"):
            told = ["write", os.path.abspath(os.fsdecode(args[0]))] if not isinstance(args[0], int) and args[-1] in (-1, None) else None
        else:
            return
        if told:
            os.write(log, (json.dumps(told) + "\n").encode())

    sys.addaudithook(heard)


def _broken() -> float:
    raise RuntimeError("no clock")


def _connect(handle: int, kind: str, file: str) -> None:
    """Let ``handle`` write to a file, a full disk, a pipe that nobody reads, nothing, or a terminal of 40 columns."""
    if kind == "pipe":
        read, write = os.pipe()
        os.close(read)
    elif kind == "terminal":
        read, write = pty.openpty()
        termios.tcsetwinsize(write, (20, 40))
        threading.Thread(target=_drain, args=(read, file), daemon=True).start()
    elif kind == "none":
        os.close(handle)
        return
    else:
        write = os.open("/dev/full" if kind == "full" else file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(write, handle)


def _drain(read: int, file: str) -> None:
    with open(file, "wb", buffering=0) as shown:
        while content := os.read(read, 65536):
            shown.write(content)


def forked(job: dict) -> dict:
    """Run a victim to its end, and return how it ended: {"code": 3}, {"signal": 9}."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            if "argv" in job:
                code = verb(job)
            else:
                quiet = os.open(os.devnull, os.O_WRONLY)
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
