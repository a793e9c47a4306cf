"""The power goes: of all that a run has written, only what was flushed to the device before is there afterwards."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qlite.files import is_whole
from qlite.training.run_folder import RunFolder
from tests.crash.faults import said
from tests.crash.test_kills import SHORT, sums

pytestmark = pytest.mark.crash


@dataclass
class File:
    kept: bytes = b""


@dataclass
class Folder:
    inside: dict[str, "File | Folder"] = field(default_factory=dict)
    kept: dict[str, "File | Folder"] = field(default_factory=dict)
    """The names that a flush of the folder has put on the device."""


class Disk:
    """What is on the device, call by call: a file's content and a folder's names as of their last flush, and nothing else."""

    def __init__(self, root: str):
        self.root, self.top = root, Folder()

    def replay(self, number: int, call: list[str], contents: Path) -> None:
        kind, path, *more = call
        parent, name = self._place(path)
        if kind == "mkdir":
            parent.inside[name] = Folder()
        elif kind in ("open", "write"):
            parent.inside.setdefault(name, File())
        elif kind in ("replace", "rename"):
            other, new = self._place(more[0])
            other.inside[new] = parent.inside.pop(name)
        elif kind in ("unlink", "rmdir"):
            parent.inside.pop(name)
        elif kind == "fsync":
            flushed = self.top if path == self.root else parent.inside[name]
            if isinstance(flushed, Folder):
                flushed.kept = dict(flushed.inside)
            else:
                flushed.kept = (contents / str(number)).read_bytes()

    def write(self, to: Path, folder: Folder | None = None) -> None:
        """Write what is on the device to the new folder ``to``."""
        to.mkdir(exist_ok=True)
        for name, part in (folder or self.top).kept.items():
            if isinstance(part, Folder):
                self.write(to / name, part)
            else:
                (to / name).write_bytes(part.kept)

    def _place(self, path: str) -> tuple[Folder, str]:
        *above, name = Path(path).relative_to(self.root).parts or ("",)
        folder = self.top
        for part in above:
            folder = folder.inside[part]
        return folder, name


def test_after_any_flush_the_newest_checkpoint_is_whole_and_goes_on_to_the_same_bytes(server, tmp_path, tell):
    folder, contents = tmp_path / "victim", tmp_path / "contents"
    folder.mkdir()
    contents.mkdir()
    assert server(folder, SHORT, log=str(tmp_path / "log"), faults={"contents": str(contents)})["code"] == 0
    calls, expected = json.loads((tmp_path / "log").read_text()), sums(folder)
    disk = Disk(str(folder / "run"))
    is_saved, checked, resumed = False, 0, 0
    for number, call in enumerate(calls):
        disk.replay(number, call, contents)
        if call[0] != "fsync":
            continue  # nothing new is on the device
        shutil.rmtree(folder / "run")
        disk.write(folder / "run")
        checkpoints = list((folder / "run" / "checkpoints").glob("step-*"))
        assert all(map(is_whole, checkpoints)), call
        is_saved |= bool(checkpoints)
        assert bool(checkpoints) == is_saved, f"no checkpoint is left after {call}"
        checked += 1
        if checked % 4 == 0:
            is_finished = RunFolder(folder / "run").is_finished
            assert server(folder, SHORT)["code"] == 0, (call, said(folder / "told")[-1])
            if is_finished:  # it is not gone on with, so a checkpoint whose deletion was not on the device yet is still there, and whole
                RunFolder(folder / "run").rotate(SHORT["output"]["keep"])
            assert sums(folder) == expected, call
            resumed += 1
    tell(f"power lost after any of {checked} flushes: every checkpoint whole; {resumed}/{resumed} of those gone on with, same bytes")
    assert checked > 40
    assert is_saved
