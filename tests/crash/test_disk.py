"""Disks that are full, over a quota, read-only or failing: one line, exit code 3, and what was there before is as it was."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlite import room
from qlite.errors import DiskError
from qlite.files import is_whole
from qlite.hashes import sha256
from qlite.methods.base import trainable_count
from qlite.training import disk
from qlite.training.run import prepare
from qlite.training.run_folder import RunFolder
from tests.crash.faults import said
from tests.crash.test_kills import ROOT, SHORT, fresh, sums
from tests.tiny_run import Watcher, run, tiny_recipe

pytestmark = pytest.mark.crash

ERRORS = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room",
    errno.EFBIG: "Make room",
    errno.EIO: "may be failing",
    errno.EROFS: "read-only",
}
WRITES = ["open", "write", "fsync", "mkdir", "replace"]


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert server(folder, SHORT)["code"] == 0
    return folder


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("kind", WRITES)
def test_a_disk_that_refuses_leaves_the_old_checkpoint_as_it_was(server, whole, tmp_path, tell, error, kind):
    folder = fresh(whole, tmp_path / "victim")
    # From the first such call after step 3 on, every one fails: the checkpoints of steps 1 and 2 are made.
    ended = server(folder, SHORT, since=3, faults={"refuse": 0, "error": error, "only": [kind]})
    assert ended.get("code") == 3
    left = [path for path in (folder / "run" / "checkpoints").glob("step-*") if is_whole(path)]
    assert [path.name for path in left] == ["step-00000002"]
    *_, line = said(folder / "told")
    assert line.startswith('cannot write "')
    assert ERRORS[error] in line
    assert os.strerror(error) in line
    assert "are free there" in line
    assert "\n" not in line
    assert server(folder, SHORT)["code"] == 0
    assert sums(folder) == sums(whole)
    tell(f"disk refuses {kind} with {errno.errorcode[error]}: exit 3, old checkpoint whole, then the same bytes")


def test_where_the_user_wants_it_training_goes_on_to_the_next_checkpoint(server, whole, tmp_path):
    folder = fresh(whole, tmp_path / "victim")
    changes = {**SHORT, "output": {**SHORT["output"], "on_full_disk": "continue"}}
    # From step 2 on nothing can be written, neither checkpoints nor metrics nor the best adapter.
    ended = server(folder, changes, faults={"refuse": 0}, since=2)
    assert ended["code"] == 3  # the adapter at the end cannot be written, either
    assert any('on_full_disk = "continue"' in note for note in said(folder / "told"))
    assert server(folder, changes)["code"] == 0
    assert sums(folder) == sums(whole)


def test_a_disk_that_fills_up_at_the_report_leaves_a_finished_run(server, whole, tmp_path):
    folder = fresh(whole, tmp_path / "logged")
    assert server(folder, SHORT, log=str(folder / "log"))["code"] == 0
    first = next(number for number, call in enumerate(json.loads((folder / "log").read_text())) if "report.html" in call[1])
    folder = fresh(whole, tmp_path / "victim")
    assert server(folder, SHORT, faults={"refuse": first})["code"] == 0
    assert RunFolder(folder / "run").is_finished
    assert not (folder / "run" / "report.html").exists()
    assert sums(folder) == sums(whole)
    *_, line = said(folder / "told")
    assert line.startswith("all is written but the run's report: cannot write")
    assert "No space left on device" in line


def test_a_real_disk_that_is_full(server, whole, tmp_path, tell):
    """A file system of 200 KiB, in a name space of its own; the forecast is made to believe that there is room."""
    folder = fresh(whole, tmp_path / "victim")
    (folder / "run").mkdir()
    script = (
        f"mount -t tmpfs -o size=200k none {folder / 'run'} && {sys.executable} -c "
        f'"from pathlib import Path\nfrom qlite.training import disk\ndisk.require_room = lambda *_: None\n'
        f"from tests.crash.victims import victim\nimport sys\n"
        f"sys.exit(victim({{'folder': {str(folder)!r}, 'changes': {{'output': {{'keep': 3, 'save_every': 1}}}}}}))\"; "
        f"code=$?; cp -r {folder / 'run'} {folder / 'left'}; exit $code"
    )
    can = subprocess.run(["unshare", "-rm", "true"], capture_output=True) if shutil.which("unshare") else None
    if can is None or can.returncode:
        pytest.skip("no name space of its own can be had here")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    *_, line = said(folder / "told")
    assert "No space left on device" in line
    assert "it needs" in line
    whole_ones = [path for path in (folder / "left" / "checkpoints").glob("step-*") if is_whole(path)]
    assert whole_ones
    assert not list((folder / "left").rglob(".*tmp*"))
    tell("a real full disk (tmpfs): exit 3, old checkpoints whole, nothing half made left")


def test_a_file_limit_of_the_system(server, whole, tmp_path):
    """RLIMIT_FSIZE: EFBIG, from the kernel."""
    folder = fresh(whole, tmp_path / "victim")
    code = (
        "import resource, signal, sys\nfrom tests.crash.victims import victim\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"sys.exit(victim({{'folder': {str(folder)!r}, 'changes': {{}}}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "File too large" in said(folder / "told")[-1]


@pytest.mark.parametrize("plan", ["off", "tell"])
def test_too_little_room_is_known_before_the_first_step(server, whole, tmp_path, plan):
    """With a plan, before a weight is read."""
    folder = fresh(whole, tmp_path / "victim")
    ended = server(folder, {"output": {"keep": 10**9}, "memory": {"plan": plan}})
    assert ended["code"] == 3
    *_, line = said(folder / "told")
    assert "a run that keeps 1000000000 checkpoints (output.keep) would need" in line
    assert not (folder / "run").exists()


def test_what_a_run_has_written_before_counts_as_room(tmp_path, monkeypatch):
    """Else a run that fits at its start could not go on once its checkpoints are there."""
    run(tiny_recipe(tmp_path), stop_after=5)
    output, sizes = tiny_recipe(tmp_path).output, (20_000, 40_000)
    kept = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints").rglob("*") if file.is_file())
    needed = 3 * sum(sizes) + sizes[0] + disk.SMALL_FILES
    monkeypatch.setattr(room, "free_disk", lambda _: needed - kept)
    disk.require_room(output, sizes)
    monkeypatch.setattr(room, "free_disk", lambda _: needed - kept - 1)
    with pytest.raises(DiskError, match="output.keep"):
        disk.require_room(output, sizes)


def test_the_room_that_is_planned_is_the_room_that_is_taken(tmp_path):
    recipe = tiny_recipe(tmp_path, memory={"plan": "tell"}, base={"dtype": "bfloat16"})
    parts = prepare(recipe, Watcher())
    adapter, state = disk.checkpoint_bytes(parts.model, parts.optimizer)
    planned = disk.planned_bytes(parts.meter.plan)
    assert planned == (adapter, state)
    assert adapter == 2 * trainable_count(parts.model)
