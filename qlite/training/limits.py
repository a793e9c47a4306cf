"""How much is computed at once, and how that is lowered where memory has run out."""

from collections.abc import Iterable
from dataclasses import dataclass

from qlite.data.batches import Batch

# Below this many tokens the logits are small beside anything else, even of a vocabulary of 256 thousand (float32: 64 MiB).
LEAST_CHUNK = 64


@dataclass
class Limits:
    """The most that is computed at once: what has been found to be too much is not tried again."""

    loss_chunk: int
    """Tokens whose logits exist at a time."""
    most_tokens: int | None = None
    """Tokens of a micro-batch, padding and all (B * T); only a single document may be more. None: no limit is known."""

    def fit(self, batches: Iterable[Batch]) -> list[Batch]:
        """Return ``batches``, with those over the limit cut into smaller ones that hold the same documents in the same order."""
        return [part for batch in batches for part in self._cut(batch)]

    def lower(self, failed: Batch) -> bool:
        """Allow less than ``failed`` took: half its tokens or, where it is a single document, half its logits at a time.

        Returns False where neither can be any smaller.
        """
        chunk = min(self.loss_chunk, len(failed.targets))
        if failed.halves() is not None:
            self.most_tokens = failed.size // 2
        elif chunk > LEAST_CHUNK:
            self.loss_chunk = max(LEAST_CHUNK, chunk // 2)
        else:
            return False
        return True

    def __str__(self) -> str:
        """Return "at most 1024 tokens at once, the loss of 256 at a time"."""
        tokens = "" if self.most_tokens is None else f"at most {self.most_tokens} tokens at once, "
        return f"{tokens}the loss of {self.loss_chunk} at a time"

    def _cut(self, batch: Batch) -> list[Batch]:
        halves = batch.halves() if self.most_tokens is not None and batch.size > self.most_tokens else None
        return [batch] if halves is None else self.fit(halves)
