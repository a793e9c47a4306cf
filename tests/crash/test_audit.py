"""What a run and an export open, connect to and start: what the recipe names, the run's folder, the cache, and nothing else."""

import os
import sys
from pathlib import Path

import pytest

from tests.crash.faults import said
from tests.crash.test_kills import SHORT, fresh
from tests.crash.test_surroundings import typed

pytestmark = pytest.mark.crash


def test_train_and_export_touch_nothing_but_their_own(server, tmp_path, tell):
    base = tmp_path / "given"
    base.mkdir()
    assert server(base, SHORT)["code"] == 0  # makes base and rows
    folder, cache = fresh(base, tmp_path / "mine"), tmp_path / "cache"
    canary = tmp_path / "canary"
    canary.write_text("nobody reads this")
    out = tmp_path / "exported"
    jobs = {"train": typed(folder, {}), "export": [str(folder / "run"), "--merge", "--out", str(out)]}
    events = []
    for verb, argv in jobs.items():
        log = tmp_path / f"{verb}.log"
        ended = server(folder, SHORT, verb=verb, argv=argv, audit=str(log), env={"QLITE_CACHE": str(cache)})
        assert ended["code"] == 0, (folder / "stderr").read_text()
        events += said(log)
    python = {os.path.realpath(each) for each in (sys.prefix, sys.base_prefix, *sys.path) if each}
    readable = [
        *map(str, (base, folder, cache, out)),
        f"{tmp_path}/.exported.",
        *python,
        *sys.path,
        sys.prefix,
        "/proc/",
        "/sys/",
        "/dev/",
        "/usr/",
        "/etc/",
    ]
    writable = [*map(str, (folder / "run", cache, out)), f"{tmp_path}/.exported.", "/dev/null"]
    reads = {path for kind, path in events if kind == "read" and not os.path.isdir(path)}  # a folder is opened to be flushed
    writes = {path for kind, path in events if kind == "write"}
    assert len(reads) > 20
    assert len(writes) > 10
    assert {path for path in reads if not path.startswith(tuple(readable))} == set()
    assert {path for path in writes if not path.startswith(tuple(writable))} == set()
    assert str(canary) not in reads
    assert [event for kind, event in events if kind in ("talk", "run")] == []
    tell(f"train and export: {len(reads)} files read and {len(writes)} written, all their own; 0 connections, 0 processes, 0 pickles")


def test_the_log_would_show_it(tmp_path):
    """The hook hears what it is there for."""
    import subprocess

    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.crash.victims import _audit\nimport os, pickle, socket\n"
        f"_audit({str(tmp_path / 'log')!r})\n"
        f"open({str(tmp_path / 'x')!r}, 'w').close()\nopen({str(tmp_path / 'x')!r}).close()\nsocket.socket().close()\n"
        "os.system('true')\npickle.loads(pickle.dumps(os.getcwd))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    told = said(tmp_path / "log")
    for expected in (["write", str(tmp_path / "x")], ["read", str(tmp_path / "x")], ["run", "os.system"], ["run", "pickle.find_class"]):
        assert expected in told
    assert any(kind == "talk" and event.startswith("socket.") for kind, event in told)
