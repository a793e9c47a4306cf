"""What depends on the system, as Windows has it: its paths, its signals, its files that are open and cannot be deleted."""

import json
import os
import signal
import sys
from pathlib import PureWindowsPath
from types import SimpleNamespace

import pytest

from qlite import files, lock, stopping
from qlite.data.sources import is_hub
from qlite.errors import MachineError, ModelError
from qlite.files import new_folder, write_text
from qlite.lock import held
from qlite.model import wheel
from qlite.model.checkpoint import INDEX_FILE, open_checkpoint
from qlite.model.source import ModelFiles, locate
from tests.tiny_run import save_tiny_base

PATHS = [r"C:\models\llama", "C:/models/llama", r"..\models\llama", r".\llama", r"\\server\share\llama", r"D:\llama.gguf"]
INSIDE = [
    "C:shard.safetensors",
    r"C:\shard.safetensors",
    r"..\shard.safetensors",
    r"sub\shard.safetensors",
    "shard.safetensors:stream",
    "NUL:",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_windows_path_is_no_hub_id(path):
    with pytest.raises(ModelError, match="there is no|no such|is no"):
        locate(path, None, None, lambda *_: None)


@pytest.mark.parametrize("path", [r"C:\data\rows.jsonl", "C:/data/rows.jsonl", r"data\rows.csv", r"\\server\data\rows.txt", r"C:\data"])
def test_a_windows_path_is_no_hub_data_set(path):
    assert not is_hub(path)


@pytest.mark.parametrize("name", INSIDE)
def test_no_index_leads_out_of_the_folder_on_windows(name, tmp_path):
    """A drive, a backslash and a stream of a file are names on Linux and ways out on Windows: refused on both."""
    folder = save_tiny_base(tmp_path / "base")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ModelError, match="not a plain file name"):
        open_checkpoint(ModelFiles(folder, None, "base"))


@pytest.mark.parametrize("path", [r"..\x.gguf", r"C:\x.gguf", "C:x.gguf", r"a\b.gguf"])
def test_no_wheel_member_leads_out_of_the_cache_on_windows(path):
    with pytest.raises(ModelError, match="plain path inside the wheel|not of the form"):
        wheel.parse(f"pypi:some-model==1.0/{path}")


def test_our_own_names_are_names_on_windows(tmp_path):
    with new_folder(tmp_path / "step-00000001") as folder:
        write_text(folder / "state.json", "{}")
        temporary = folder.name
    for name in (temporary, "step-00000001", lock.LOCK, files.MANIFEST, "metrics-0001.jsonl", f".x.old-{files._me()}"):
        assert not set(name) & set('<>:"/\\|?*')
        assert not name.endswith((".", " "))
        assert not PureWindowsPath(name).is_reserved()


def test_signals_are_those_that_the_system_has(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    monkeypatch.setattr(signal, "SIGBREAK", 21, raising=False)
    assert stopping.signals() == [signal.SIGINT, signal.SIGTERM, 21]


def test_a_lock_file_is_closed_before_it_is_deleted_on_windows(tmp_path, monkeypatch):
    done = []
    with monkeypatch.context() as patch:
        for name in ("close", "unlink"):
            before = getattr(os, name)
            patch.setattr(os, name, lambda *args, name=name, before=before, **kwargs: done.append(name) or before(*args, **kwargs))
        for system in ("nt", "posix"):
            with held(tmp_path / system):
                done.clear()
                patch.setattr(lock.os, "name", system)
            patch.setattr(lock.os, "name", "posix")
            assert done[:2] == (["close", "unlink"] if system == "nt" else ["unlink", "close"])


@pytest.mark.parametrize("refusals", [0, 3])
def test_a_name_that_a_scanner_holds_is_asked_for_again(tmp_path, monkeypatch, refusals):
    tried, rename = [], os.replace

    def refuse(*names):
        tried.append(names)
        if len(tried) <= refusals:
            raise PermissionError(13, "The process cannot access the file because it is being used by another process")
        rename(*names)

    monkeypatch.setattr(files, "IS_WINDOWS", True)
    monkeypatch.setattr(files, "PAUSES", (0, 0, 0, 0))
    monkeypatch.setattr(os, "replace", refuse)
    write_text(tmp_path / "here", "text")
    assert (tmp_path / "here").read_text() == "text"
    assert len(tried) == refusals + 1


def test_a_name_that_is_held_for_good_is_told_and_the_old_folder_is_back(tmp_path, monkeypatch):
    with new_folder(tmp_path / "model") as folder:
        write_text(folder / "part", "old")
    rename = os.replace

    def refuse(path, name):
        if ".tmp-" in str(path):
            raise PermissionError(13, "The process cannot access the file")
        rename(path, name)

    monkeypatch.setattr(files, "IS_WINDOWS", True)
    monkeypatch.setattr(files, "PAUSES", (0,))
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(MachineError, match="cannot access"), new_folder(tmp_path / "model") as folder:
        (folder / "part").write_text("new")
    assert (tmp_path / "model" / "part").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_on_macos_the_drive_is_flushed_and_where_it_knows_no_such_flush_the_file(tmp_path, monkeypatch):
    asked, plain, refuses = [], [], False

    def full_flush(handle, what):
        asked.append(what)
        if refuses:
            raise OSError(45, "Operation not supported")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "fcntl", SimpleNamespace(fcntl=full_flush, F_FULLFSYNC=51))
    monkeypatch.setattr(os, "fsync", plain.append)
    write_text(tmp_path / "one", "text")
    assert asked == [51, 51]  # the file, and the folder with its name
    assert plain == []
    refuses = True
    write_text(tmp_path / "two", "text")
    assert len(plain) == 2
