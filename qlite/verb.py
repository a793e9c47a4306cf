"""What every verb shares: an error of the user's ends with its message and exit code, never with a traceback."""

import os
import sys
from collections.abc import Callable

from qlite.errors import QliteError


def run_verb(main: Callable[[list[str]], None]) -> None:
    """Run ``main`` with the command line's arguments and leave the process with the right exit code."""
    # Told apart from a user's own setting: without it, tokenizers warns about forks that qlite never makes.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main(sys.argv[1:])
    except QliteError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(130)
