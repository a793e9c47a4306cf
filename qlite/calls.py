"""What every function that Python calls shares: the process it is called in, a notebook's above all, is afterwards as it was before.

A verb has a process of its own, which ends. Here others' work goes on: torch's threads and generators, the environment and the memory
are theirs, and an error that a notebook keeps must not keep a model with it.
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from qlite import device
from qlite.compiling import FOLDER_OF_INDUCTOR
from qlite.errors import MachineError
from qlite.stopping import Stopped


@contextmanager
def called() -> Iterator[None]:
    """Run what is inside, and leave the process as it was.

    Raises:
        MachineError: memory ran out.
        KeyboardInterrupt: Ctrl-C, or a notebook's kernel that is interrupted.
    """
    outer = sys.exception()
    try:
        with device.settings_kept(), _environment_kept():
            yield
    except BaseException as error:
        _forget_locals(error, outer)
        device.give_back_all()
        if isinstance(error, Stopped) and not isinstance(error, KeyboardInterrupt):
            # A shutdown or a closed terminal was only put off, for a checkpoint: who answered it before answers it now.
            signal.raise_signal(error.number)
        if device.is_out_of_memory(error):
            raise MachineError(device.out_of_memory_words(error)) from error
        raise
    device.give_back_all()


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Leave the one variable that compiling sets as it was: others' torch.compile keeps its files where it did."""
    before = os.environ.get(FOLDER_OF_INDUCTOR)
    try:
        yield
    finally:
        if before is not None:
            os.environ[FOLDER_OF_INDUCTOR] = before
        else:
            os.environ.pop(FOLDER_OF_INDUCTOR, None)


def _forget_locals(error: BaseException, outer: BaseException | None) -> None:
    """Empty the frames that ``error`` and what led to it have passed, but for ``outer``, the caller's. The lines of its traceback stay.

    Python and notebooks keep the last error, an error its frames, and these their variables: the model and the optimizer would stay in
    memory until the next error, and the same cell, run again to go on, would need the memory twice.
    """
    seen = {id(outer)}
    chain: list[BaseException | None] = [error]
    while chain:
        each = chain.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            chain += [each.__cause__, each.__context__]
