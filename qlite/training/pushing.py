"""Sends an export to the Hugging Face hub: packed first, so that what would be sent can be shown; nothing private goes with it.

Source: huggingface_hub 2.4, hf_api.py (create_repo, create_commit) and errors.py.
"""

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qlite.errors import ExportError, MachineError, QliteError, RecipeError, RunError, shown
from qlite.files import MANIFEST, is_whole
from qlite.formats.gguf_lora import SOURCE
from qlite.formats.peft import WEIGHTS
from qlite.hashes import sha256
from qlite.model.gguf_header import read_header
from qlite.recipe.schema import Recipe
from qlite.recipe.share import without_folders
from qlite.training.auditing import FILE
from qlite.training.run_folder import RunFolder
from qlite.units import format_bytes

CARD = "README.md"
TEXTS = {CARD, "Modelfile", "adapter_config.json", "config.json", "generation_config.json", "audit.json"}
"""Files in which a folder of this machine may stand. A tokenizer's and its template are none of them: "../" is a token there."""
CARD_LINES = 24
"""Of the card's head, as it is shown before it is sent."""
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
"""What --dtype calls the types that an audit names."""
SOURCE_IN_AUDIT = "adapter_sha256"
HUBS_OWN = {".gitattributes"}
"""What a hub puts into a new repository."""


@dataclass(frozen=True)
class Parcel:
    """What is sent, and where to."""

    repository: str
    is_public: bool
    folder: Path
    texts: dict[str, bytes]
    """Files that are not sent as they are: without the names of folders."""
    sizes: dict[str, int]
    """Bytes of every file that is sent, by its name."""

    def lines(self) -> list[str]:
        """Return what would be sent, to be read."""
        visibility = "public: anybody can read it" if self.is_public else "private"
        width = max(map(len, self.sizes))
        files = [
            f"  {name:{width}}  {format_bytes(size):>9}{'  (folders of this machine taken out)' if name in self.texts else ''}"
            for name, size in self.sizes.items()
        ]
        card = (self.texts.get(CARD) or (self.folder / CARD).read_bytes()).decode("utf-8").splitlines()
        more = [f"  ... {len(card) - CARD_LINES} more lines"] if len(card) > CARD_LINES else []
        total = format_bytes(sum(self.sizes.values()))
        head = f"{self.folder} -> {self.repository} ({visibility}): {len(self.sizes)} files, {total}"
        return [head, *files, f"{CARD} begins:", *(f"  {line}" for line in card[:CARD_LINES]), *more]


def require_repository(name: str) -> None:
    """Raise RecipeError unless ``name`` can be a repository's. Source: huggingface_hub.utils.validate_repo_id."""
    parts = name.split("/")
    if len(parts) != 2 or not all(re.fullmatch(r"\w([\w.-]*\w)?", part, re.ASCII) and ".." not in part for part in parts):
        raise RecipeError(f'--push "{shown(name)}": should be ORG/NAME or USER/NAME of letters, digits, "-", "_" and "."')


def pack(folder: Path, recipe: Recipe, repository: str, is_public: bool) -> Parcel:
    """Return what of the export in ``folder`` is sent to ``repository``.

    Raises:
        ExportError: something in the folder is not what an export wrote, or it has no card.
    """
    if not is_whole(folder):
        raise ExportError(f'"{folder}" is no whole export of qlite\'s: what is in it is not what was written. Write it anew with --force')
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST}
    if CARD not in files:
        raise ExportError(f'"{folder}" has no {CARD}, which earlier versions did not write. Write it anew with --force')
    texts = {name: text for name in sorted(TEXTS & files.keys()) if (text := _cleaned(files[name], recipe)) is not None}
    sizes = {name: len(texts[name]) if name in texts else path.stat().st_size for name, path in files.items()}
    return Parcel(repository, is_public, folder, texts, sizes)


def require_asked(folder: Path, run: RunFolder, asked: str, onto: str | None) -> None:
    """Raise RunError unless the whole export in ``folder`` is ``run``'s adapter as the options ``asked`` write it.

    ``onto``: over which weights it is to be merged; None: over either.
    """
    audit = {}
    with suppress(OSError, ValueError):
        audit = json.loads((folder / FILE).read_text(encoding="utf-8"))
    found, source = _written_by(folder, audit)
    if found != asked:
        wrong = (
            f"was written with {found}, and this asks for {asked}" if found else f"is no export that this knows, and {asked} is asked for"
        )
    elif onto is not None and audit.get("onto") != onto:
        wrong = f"is merged over the {audit.get('onto')} weights, and this asks for --onto {onto}"
    elif source != sha256((run.peft_adapter if asked == "--adapter" else run.adapter) / WEIGHTS):
        wrong = f'holds another adapter than "{run.path}" does' if source else f'does not say whether it is of the run in "{run.path}"'
    else:
        return
    raise RunError(f'"{folder}" {wrong}; --force writes it anew, or give another --out')


def _written_by(folder: Path, audit: dict) -> tuple[str | None, str | None]:
    """Return the options with which the export in ``folder`` was written, and the SHA-256 of the adapter it was made of; None: not said."""
    if "dtype" in audit:
        return f"--merge --dtype {DTYPES.get(audit['dtype'], audit['dtype'])}", audit.get(SOURCE_IN_AUDIT)
    if "type" in audit:
        return f"--gguf {audit['type']}", audit.get(SOURCE_IN_AUDIT)
    if (folder / WEIGHTS).is_file():
        return "--adapter", sha256(folder / WEIGHTS)
    if (file := next(folder.glob("*.gguf"), None)) is not None:
        return "--gguf-adapter", read_header(file).metadata.get(SOURCE)
    return None, None


def _cleaned(path: Path, recipe: Recipe) -> bytes | None:
    """Return what is sent in the place of ``path``; None: the file itself."""
    text = path.read_bytes().decode("utf-8")
    clean = text
    if path.name == "Modelfile":  # where its weights lie: for who has fetched all, beside it
        clean = re.sub(r"(?m)^FROM (.*)$", lambda found: f"FROM ./{os.path.basename(found[1])}", text)
    clean = without_folders(clean, recipe)
    return clean.encode() if clean != text else None


def send(parcel: Parcel) -> str:
    """Put ``parcel`` into its repository, which is made if there is none, as one commit; return its address.

    Raises:
        RecipeError: nobody is logged in, or may write there; the repository holds something else or is not as private as asked.
        MachineError: the hub could not be reached or broke off; nothing is to be seen there of a half of it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi  # here: it takes half a second, and only a push needs it

    api = HfApi()
    try:
        api.whoami()
        _require_place(api, parcel)
        files = [CommitOperationAdd(name, parcel.texts.get(name, parcel.folder / name)) for name in parcel.sizes]
        api.create_commit(parcel.repository, files, commit_message="Upload by qlite")
    except QliteError:
        raise
    except Exception as error:  # the hub, its HTTP client and its chunk store have no root in common
        raise _told(parcel, error) from error
    return f"{api.endpoint}/{parcel.repository}"


def _require_place(api: object, parcel: Parcel) -> None:
    """Make the repository if there is none. Raises RecipeError if there is one that this must not go into."""
    from huggingface_hub.errors import RepositoryNotFoundError

    name = parcel.repository
    try:
        there = api.repo_info(name)
    except RepositoryNotFoundError:
        api.create_repo(name, private=not parcel.is_public)
        return
    if there.private == parcel.is_public:
        is_now = "private" if there.private else "public"
        fix = "leave out --public, or change it in its settings" if there.private else "add --public, or change it in its settings"
        raise RecipeError(f"--push {name}: this repository is there already and is {is_now}; {fix}")
    others = sorted({file.rfilename for file in there.siblings or ()} - parcel.sizes.keys() - HUBS_OWN)
    if others:
        raise RecipeError(
            f"--push {name}: this repository holds something else ({', '.join(map(shown, others[:3]))}); "
            "give another name, or delete those files there"
        )


def _told(parcel: Parcel, error: Exception) -> QliteError:
    """Return what the hub's exception means for the user."""
    from huggingface_hub import errors, get_token

    name = parcel.repository
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return RecipeError(f"--push {name}: nobody is logged in; run `hf auth login` with a token that may write, or set HF_TOKEN")
    if status == 401:
        return RecipeError(f"--push {name}: the hub does not know the token that is kept here; run `hf auth login` with a new one")
    if status in (403, 404):
        return RecipeError(
            f'--push {name}: the hub lets this token write nothing there; is "{name.partition("/")[0]}" you or an organisation of yours, '
            "and may the token write? `hf auth whoami` tells the names"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if token := get_token():
        reason = reason.replace(token, "...")
    return MachineError(
        f"--push {name}: the hub could not be reached, or broke off ({shown(reason, 200)}). Nothing half is to be seen there. "
        "The same command goes on: what the hub has got is not sent again"
    )
