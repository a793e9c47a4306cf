"""Checkpoints that are damaged afterwards are found out, and the one before is gone on with."""

import os
import random
import shutil
from pathlib import Path

import pytest

from qlite.files import is_whole
from tests.crash.faults import said
from tests.crash.test_kills import sums

pytestmark = pytest.mark.crash

LAST = {"train": {"steps": 4, "accumulation": 1, "eval_every": 0, "exact_match_rows": 0}, "output": {"save_every": 1, "keep": 3}}
ROUNDS = 100


def damage(folder: Path, chance: random.Random) -> str:
    """Do to one file of the checkpoint what a failing disk does; return what."""
    file = chance.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    content, kind = file.read_bytes(), chance.choice(["flip", "cut", "delete", "zero"])
    place = chance.randrange(len(content))
    if kind == "delete":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[:place])
    elif kind == "flip":
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :])
    else:
        size = min(len(content) - place, 4096)
        file.write_bytes(content[:place] + bytes(size) + content[place + size :])
        if file.read_bytes() == content:  # it was zeros there
            file.unlink()
    return f"{kind} of {file.name} at byte {place}"


def test_every_damage_is_found_and_the_checkpoint_before_is_gone_on_with(server, tmp_path, tell):
    folder = finished(server, tmp_path)
    expected, chance, found, resumed = sums(folder), random.Random(0), 0, 0
    (folder / "run" / "result.json").unlink()  # so that the run is not finished
    shutil.copytree(folder / "run", tmp_path / "kept")
    for number in range(ROUNDS):
        shutil.rmtree(folder / "run")
        shutil.copytree(tmp_path / "kept", folder / "run")
        newest = folder / "run" / "checkpoints" / "step-00000004"
        what = damage(newest, chance)
        found += not is_whole(newest)
        if number % 5 == 0:  # going on takes a second
            assert server(folder, LAST)["code"] == 0, what
            assert "step-00000004 is damaged" in "".join(said(folder / "told")), what
            assert sums(folder) == expected, what
            assert (folder / "run" / "checkpoints" / "damaged-step-00000004").is_dir()
            resumed += 1
    tell(f"damaged checkpoints: {found}/{ROUNDS} found; {resumed}/{ROUNDS // 5} gone on with from the one before, to the same bytes")
    assert found == ROUNDS


def finished(server, tmp_path: Path) -> Path:
    """Return a folder with a finished run."""
    folder = tmp_path / "victim"
    folder.mkdir()
    assert server(folder, LAST)["code"] == 0
    return folder


def test_without_any_whole_checkpoint_the_run_begins_anew_and_says_so(server, tmp_path):
    folder = finished(server, tmp_path)
    expected = sums(folder)
    (folder / "run" / "result.json").unlink()
    for checkpoint in (folder / "run" / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("{}")
    assert server(folder, LAST)["code"] == 0
    assert "".join(said(folder / "told")).count("is damaged") == 3
    assert sums(folder) == expected


def test_folders_of_somebody_else_are_neither_trusted_nor_deleted(server, tmp_path):
    folder = finished(server, tmp_path)
    checkpoints = folder / "run" / "checkpoints"
    (folder / "run" / "result.json").unlink()
    shutil.copytree(checkpoints / "step-00000004", checkpoints / "step-00000004-mine")
    os.makedirs(checkpoints / "step-00000099")
    (checkpoints / "step-00000099" / "state.json").write_text('{"step": 99}')
    assert server(folder, {**LAST, "output": {"save_every": 1, "keep": 1}})["code"] == 0
    assert (checkpoints / "step-00000004-mine" / "state.json").is_file()
    assert (checkpoints / "damaged-step-00000099" / "state.json").is_file()
    assert not (checkpoints / "step-00000003").exists()
