"""Whether a weight that is made dense stays so until its gradient is taken: in blocks that are computed again, where both are close."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Keeping(threading.local):
    dense = False


keeping = _Keeping()
"""Read by the layers; a thread of its own takes the gradient on a card."""


@contextmanager
def dense_weights_kept() -> Iterator[None]:
    """Enter either pass of a checkpointed block: weights that the second makes dense are kept for the gradient, right after it.

    They are saved as activations are: what the first pass saves is let go of at once, and what the second saves is used.
    """
    before, keeping.dense = keeping.dense, True
    try:
        yield
    finally:
        keeping.dense = before
