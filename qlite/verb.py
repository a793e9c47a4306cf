"""What every verb shares: an error of the user's or the machine's ends with its message and exit code, never with a traceback."""

import os
import sys
from collections.abc import Callable

from qlite.errors import MachineError, QliteError


def run_verb(main: Callable[[list[str]], None], interrupted: str = "interrupted") -> None:
    """Run ``main`` with the command line's arguments and leave the process with the right exit code."""
    # Rows are tokenised on all cores; without a word of it, the tokenizers library warns at every later fork that it may deadlock.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a character that the terminal's encoding lacks is no reason to stop
    try:
        main(sys.argv[1:])
    except QliteError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except (RuntimeError, MemoryError) as error:
        from qlite.device import is_out_of_memory  # here: it imports torch, which a verb's --help does without

        if not is_out_of_memory(error):
            raise
        first = (str(error) or "no more to be had").splitlines()[0]
        print(
            f"out of memory: {first}\nLower train.micro_batch (and raise train.accumulation), train.tokens or memory.loss_chunk",
            file=sys.stderr,
        )
        sys.exit(MachineError.exit_code)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
