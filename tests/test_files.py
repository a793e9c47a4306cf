"""What is written is whole or not there at all."""

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlite import files
from qlite.errors import MachineError
from qlite.files import MANIFEST, drop_oldest, is_whole, new_folder, write_json, write_tensors, write_text
from qlite.lock import held


def test_a_folder_appears_whole_with_the_sums_of_its_files(tmp_path):
    with new_folder(tmp_path / "a" / "b") as folder:
        write_text(folder / "x.txt", "x")
        assert not (tmp_path / "a" / "b").exists()
    assert is_whole(tmp_path / "a" / "b")
    assert set(json.loads((tmp_path / "a" / "b" / MANIFEST).read_text())) == {"x.txt"}


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "no manifest"])
def test_damage_to_any_file_is_seen(tmp_path, damage):
    with new_folder(tmp_path / "f") as folder:
        write_text(folder / "x.txt", "hello")
    file = tmp_path / "f" / ("x.txt" if damage != "no manifest" else MANIFEST)
    {
        "flip": lambda: file.write_text("hellp"),
        "cut": lambda: file.write_text("hell"),
        "delete": file.unlink,
        "no manifest": file.unlink,
    }[damage]()
    assert not is_whole(tmp_path / "f")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_if_filling_it_fails_nothing_is_left_and_the_old_one_stays(tmp_path, error):
    with new_folder(tmp_path / "f") as folder:
        write_text(folder / "x.txt", "old")

    def fill():
        with new_folder(tmp_path / "f") as folder:
            write_text(folder / "x.txt", "new")
            raise error

    with pytest.raises(error):
        fill()
    assert (tmp_path / "f" / "x.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_what_was_stopped_in_this_process_goes_on_or_goes_when_the_folder_is_made_otherwise(tmp_path):
    def stopped(key: str) -> None:
        with suppress(KeyboardInterrupt), new_folder(tmp_path / "f", key) as folder:
            write_text(folder / f"{key}.txt", key)
            raise KeyboardInterrupt

    stopped("fp16")
    stopped("fp16")  # takes over what the first has left
    assert len(list(tmp_path.iterdir())) == 1
    with new_folder(tmp_path / "another", "bf16"):
        pass
    assert len(list(tmp_path.iterdir())) == 2
    with new_folder(tmp_path / "f", "bf16") as folder, new_folder(tmp_path / "f.g"):  # as two threads would
        assert not (folder / "fp16.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "f", "f.g"]
    stopped("fp16")
    with new_folder(tmp_path / "f") as folder:
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "f", "f.g"]


def test_the_oldest_folders_go_first_and_what_another_process_is_doing_is_left_alone(tmp_path, monkeypatch):
    for number, name in enumerate(("old", "kept", "new")):
        with new_folder(tmp_path / name) as folder:
            write_text(folder / "x.txt", "x" * 1000)
        os.utime(tmp_path / name / MANIFEST, (number, number))
    (tmp_path / "new").rename(tmp_path / ".new.tmp-1")  # being made
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "y.txt").write_text("y")
    with new_folder(tmp_path / "going") as folder:
        write_text(folder / "x.txt", "x")
    is_ours = files._is_ours

    def deleted_meanwhile(folder: Path) -> bool:
        if folder.name == "going":
            shutil.rmtree(folder)
            return True
        return is_ours(folder)

    monkeypatch.setattr(files, "_is_ours", deleted_meanwhile)
    drop_oldest(tmp_path, 1500, keep=tmp_path / "kept")
    assert {path.name for path in tmp_path.iterdir()} == {"kept", ".new.tmp-1", "theirs"}
    drop_oldest(tmp_path, 0, keep=tmp_path / "kept")
    assert (tmp_path / "kept").exists()


def test_a_file_that_cannot_be_written_is_said_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"cannot write .*file.*x\.txt"):
        write_text(tmp_path / "file" / "x.txt", "x")


def test_views_of_one_buffer_are_written_as_tensors_of_their_own(tmp_path):
    buffer = torch.arange(6.0)
    write_tensors(tmp_path / "t.safetensors", {"a": buffer[:2], "b": buffer[2:].view(2, 2).T})
    read = load_file(tmp_path / "t.safetensors")
    assert torch.equal(read["a"], torch.tensor([0.0, 1.0]))
    assert torch.equal(read["b"], torch.tensor([[2.0, 4.0], [3.0, 5.0]]))


def test_numbers_that_are_not_json_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_what_is_set_aside_never_gives_way(tmp_path):
    for number in range(3):
        (tmp_path / "f").mkdir()
        (tmp_path / "f" / "note.txt").write_text(str(number))
        files.set_aside(tmp_path / "f")
    assert {path.name: (path / "note.txt").read_text() for path in tmp_path.iterdir()} == {
        "damaged-f": "0",
        "damaged-f-1": "1",
        "damaged-f-2": "2",
    }


def test_a_folder_that_was_there_before_stays_when_it_is_let_go(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "mine", tmp_path / "new" / "run"):
        with held(folder):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_cannot_be_read_while_a_folder_is_filled_is_not_said_to_be_a_write(tmp_path):
    (tmp_path / "out").mkdir()
    missing = tmp_path / "base" / "tokenizer.json"
    with (
        pytest.raises(MachineError, match=re.escape(f'cannot read "{missing}", for "{tmp_path / "out" / "export"}": No such file')),
        new_folder(tmp_path / "out" / "export"),
    ):
        missing.read_text()
    with pytest.raises(MachineError, match="cannot write"), new_folder(tmp_path / "out" / "export") as folder:
        (folder / "there is none" / "x.txt").write_text("x")
    assert list((tmp_path / "out").iterdir()) == []
