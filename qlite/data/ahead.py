"""The next step's batches are made while this one is computed."""

from concurrent.futures import Future, ThreadPoolExecutor

from qlite.data.batches import Batch, TokenBatches


class Ahead:
    """Gives the batches of step after step; a thread reads, packs and pads the rows of the one to come."""

    def __init__(self, batches: TokenBatches, last: int):
        """``last``: the number of the last step."""
        self._batches, self._last = batches, last
        self._thread = ThreadPoolExecutor(1, "batches")
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def step(self, number: int) -> list[Batch]:
        """Return what ``TokenBatches.step`` does, and begin with the next."""
        if self._next is None or self._next[0] != number:
            self._next = (number, self._thread.submit(self._batches.step, number))
        made = self._next[1].result()
        self._next = (number + 1, self._thread.submit(self._batches.step, number + 1)) if number < self._last else None
        return made
