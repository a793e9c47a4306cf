"""What an adapter says of where it is from: base, storage, template, tokenizer, rows, recipe and versions, in its file's metadata.

An adapter is a change of one base under one template. Over another it is loaded as readily, and answers nonsense.
"""

import json
import re
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlite import __version__
from qlite.data.encoding import tokenizer_hash
from qlite.errors import AdapterError
from qlite.formats.peft import read_metadata
from qlite.hashes import sampled_hash
from qlite.methods.token_rows import token_ids
from qlite.model.load import LoadedBase
from qlite.recipe.keys import toml_value
from qlite.recipe.schema import Recipe
from qlite.recipe.share import shareable
from qlite.recipe.write import full_names, recipe_tables
from qlite.units import format_bytes

KEY = "qlite"
"""Of the safetensors metadata; its value is JSON."""
CONFIG = "config.json"
LIBRARIES = ("torch", "bitsandbytes", "transformers", "safetensors", "tokenizers")
WATCHING = {
    *("base.cache", "base.fused", "train.eval_every", "train.exact_match_rows"),
    *("train.answer_tokens", "train.samples", "train.max_skipped"),
}
"""Keys that say what is looked at, or where it is kept; so does all of memory, parallel and output."""
WITHOUT_EFFECT = ("base.model", "base.revision", "base.sha256", "base.attention", "method.dropout", "method.*.dropout")
"""Keys of base and method that a trained adapter does not depend on; which files the base is, their hashes tell."""


def versions() -> dict[str, str]:
    """Return the versions of qlite and of the libraries that compute."""
    return {"qlite": __version__, **{name: version(name) for name in LIBRARIES}}


def provenance(recipe: Recipe, base: LoadedBase, identity: dict[str, str]) -> dict[str, str]:
    """Return the metadata of the adapter that ``recipe`` trains over ``base`` with the rows, template and tokenizer of ``identity``.

    No path of this machine is in it.
    """
    said = {
        "base": {"name": shareable(recipe).base.model, **_files(base)},
        "identity": identity,
        "recipe": _deciding(recipe),
        "versions": versions(),
    }
    return {KEY: json.dumps(said, sort_keys=True)}


def _deciding(recipe: Recipe) -> dict[str, dict]:
    """Return the recipe's tables with the keys that decide what is trained: two runs that differ in others end with the same bytes."""
    tables = recipe_tables(shareable(recipe))
    return {
        table: {key: value for key, value in tables[table].items() if f"{table}.{key}" not in WATCHING}
        for table in ("base", "method", "optimizer", "schedule", "data", "train")
    }


def _files(base: LoadedBase) -> dict:
    """Return the hub's commit, if the base is from there, and size and hashes of each of its weight files."""
    files = {path.name: _facts(path) for path in base.checkpoint.weight_files()}
    folder = base.checkpoint.files.folder
    is_snapshot = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return {"files": files} | ({"revision": folder.name} if is_snapshot else {})


def _facts(path: Path) -> dict:
    facts = {"bytes": path.stat().st_size, "sampled": sampled_hash([path], with_names=False)}
    blob = path.resolve().name  # the hub's cache calls large files by their SHA-256
    return facts | ({"sha256": blob} if re.fullmatch(r"[0-9a-f]{64}", blob) else {})


def read_provenance(folder: Path) -> dict | None:
    """Return what the adapter in ``folder`` says of itself; None where another program or an earlier version wrote it, or it is damaged."""
    try:
        said = json.loads(read_metadata(folder).get(KEY, "null"))
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def said_identity(said: dict | None) -> dict[str, str]:
    """Return the hashes, by key, of what an adapter says that it was trained with; of what is no hash, nothing."""
    found = said.get("identity") if said else None
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def common_provenance(said: list[dict | None]) -> dict[str, str]:
    """Return the metadata of an adapter made of those that say ``said``: base and identity as far as all of them say the same."""
    identities = [said_identity(each) for each in said]
    agreed = {key: value for key, value in identities[0].items() if all(each.get(key) == value for each in identities)}
    bases = [each.get("base") if each else None for each in said]
    same = {"base": bases[0]} if bases[0] and all(_same_files(bases[0], each) for each in bases) else {}
    return {KEY: json.dumps({**same, "identity": agreed, "versions": versions()}, sort_keys=True)}


def _same_files(one: object, other: object) -> bool:
    """Return whether two adapters' "base" are the same files, whatever they are called."""
    try:
        return sorted(_weights(one["files"]).values()) == sorted(_weights(other["files"]).values())
    except (KeyError, TypeError, AttributeError):
        return False


def require_same_keys(folder: Path, recipe: Recipe, path: Path) -> None:
    """Raise AdapterError if the adapter in ``folder`` was trained with other keys of base or method than ``recipe``, read from ``path``.

    Scaling, for example, is in no tensor: with another alpha the adapter is loaded and does something else.
    """
    said = read_provenance(folder)
    if said is None:
        return
    now = {table: full_names(table, values) for table, values in _deciding(recipe).items()}
    try:
        changed = [
            f"{key}: {toml_value(value)} -> {toml_value(now[table][key])}"
            for table in ("base", "method")
            for key, value in full_names(table, said["recipe"][table]).items()
            if not any(fnmatchcase(key, pattern) for pattern in WITHOUT_EFFECT) and now[table].get(key, value) != value
        ]
    except (KeyError, TypeError, AttributeError):
        return
    if changed:
        raise AdapterError(f"{folder}: was trained with other keys than {path} has now: {'; '.join(changed)}. Put the old ones back")


def require_same_base(folder: Path, base: LoadedBase) -> None:
    """Raise AdapterError unless ``base``, loaded, has the files that the adapter in ``folder`` was trained over, as far as it says."""
    if other := other_base(folder, base):
        raise AdapterError(f"{folder}: was trained over another base: {other}. Put the old files back, or train anew")


def other_base(folder: Path, base: LoadedBase) -> str | None:
    """Return how ``base``'s weight files differ from those that the adapter in ``folder`` says it was trained over; None if they do not.

    What they are called makes no difference.
    """
    said = read_provenance(folder) or {}
    try:
        name, then, now = said["base"]["name"], _weights(said["base"]["files"]), _weights(_files(base)["files"])
    except (KeyError, TypeError, AttributeError):
        return None
    if sorted(then.values()) == sorted(now.values()):
        return None
    return f"{_named(name, then)}, and this is {_named(base.name, now)}"


def other_company(folder: Path, base: LoadedBase, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what else ``base`` and ``tokenizer`` have other than the adapter in ``folder`` says.

    It may be no more than another version's way to say it.
    """
    said, found = read_provenance(folder) or {}, []
    try:
        if said["base"]["files"].get(CONFIG, {}) != _files(base)["files"].get(CONFIG, {}):
            found.append("the base's config.json is not the one of training")
        if said["identity"]["tokenizer"] != tokenizer_hash(tokenizer):
            found.append("the tokenizer is not the one of training: its files have changed, or are read by another version of tokenizers")
    except (KeyError, TypeError, AttributeError):
        return []
    return found


def add_new_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add to ``tokenizer`` the tokens that the adapter in ``folder`` says were made for it (method.new_tokens), where it has them not."""
    said = read_provenance(folder) or {}
    try:
        keys = full_names("method", said["recipe"]["method"])
        new = [str(token) for key, value in keys.items() if key.endswith(".new_tokens") for token in value]
    except (KeyError, TypeError, AttributeError):
        return
    vocabulary = tokenizer.get_vocab()
    token_ids(tokenizer, (), [token for token in dict.fromkeys(new) if token not in vocabulary])


def _weights(files: dict) -> dict[str, str]:
    """Return size and hash, in words, of each file with weights."""
    return {str(name): f"{format_bytes(facts['bytes'])}, {facts['sampled'][:12]}" for name, facts in files.items() if name != CONFIG}


def _named(name: object, files: dict[str, str]) -> str:
    told = [f"{file}, {facts}" for file, facts in list(files.items())[:3]]
    return f"{Path(str(name)).name} ({'; '.join(told)}{'; ...' if len(files) > 3 else ''})"
