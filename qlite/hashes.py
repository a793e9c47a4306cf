"""What tells a text, code or files from any other: hashes of them."""

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path


def short_hash(text: str) -> str:
    """Return 32 digits of the SHA-256 of ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def code_hash(folders: Iterable[Path], libraries: Iterable[str]) -> str:
    """Return a hash of the Python files in ``folders`` and of the installed ``libraries``' versions: what other code made is made anew."""
    code = b"".join(path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(code + json.dumps([version(name) for name in libraries]).encode()).hexdigest()


def sampled_hash(paths: Iterable[Path], with_names: bool = True) -> str:
    """Return 32 digits that are other if the content of any file is as good as surely other: of sizes, and of 64 places in each.

    ``with_names``: other, too, if a file is called otherwise. All bytes of a model take as long to read as to load; whoever trains it
    further changes every tensor.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name if with_names else ''} {size} ".encode())
        with path.open("rb") as file:
            for place in range(64):
                file.seek(place * size // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:32]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
