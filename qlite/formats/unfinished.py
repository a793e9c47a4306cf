"""What of a folder that is being made is finished: an export that was killed, or stopped by Ctrl-C, goes on behind it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlite.files import MANIFEST, flush, new_folder, remove_file, write_json
from qlite.hashes import sha256

RECORD = "unfinished.json"


class Unfinished:
    """A folder on its way."""

    def __init__(self, path: Path, is_kept: bool):
        """``is_kept``: what a kill leaves of it is gone on with."""
        self.path, self._is_kept = path, is_kept
        try:
            self._done = json.loads((path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a new one, or killed while it was noted
            self._done = {}

    def has(self, name: str) -> bool:
        """Return whether the file ``name`` is there as it was noted."""
        return (self.path / name).is_file() and self._done.get("files", {}).get(name) == sha256(self.path / name)

    def keep(self, name: str) -> None:
        """Note that the file ``name`` is finished."""
        if not self._is_kept:
            return
        flush(self.path / name)
        self._note(files={**self._done.get("files", {}), name: sha256(self.path / name)})

    @property
    def findings(self) -> dict | None:
        """What was found out before a file was written, as ``find`` noted it."""
        return self._done.get("findings")

    def find(self, findings: dict) -> None:
        """Note ``findings``, JSON."""
        self._note(findings=findings)

    def _note(self, **done: object) -> None:
        self._done |= done
        write_json(self.path / RECORD, self._done)


@contextmanager
def unfinished_folder(path: Path, key: str | None) -> Iterator[Unfinished]:
    """Give what there is of ``path`` that a process began under the same ``key``, or a new folder; as ``new_folder`` does.

    Raises: as ``new_folder``.
    """
    with new_folder(path, key) as temporary:
        remove_file(temporary / MANIFEST)  # of a process that was killed just before the folder got its name
        yield Unfinished(temporary, key is not None)
        remove_file(temporary / RECORD)
