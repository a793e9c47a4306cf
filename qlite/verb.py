"""What every verb shares: an error of the user's or the machine's ends with its message and exit code, never with a traceback."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from qlite.errors import MachineError, QliteError, printable
from qlite.stopping import Stopped, stopping_at_once
from qlite.streams import forgiving_output

KEPT_REPORTS = 10


def run_verb(main: Callable[[list[str]], None], interrupted: str = "interrupted") -> None:
    """Run ``main`` with the command line's arguments and leave the process with the right exit code.

    0: done; 2: the user's input; 3: the machine; 4: what was trained is no good; 128 and its number: a signal; 1: a mistake of qlite's.
    """
    # Rows are tokenised on all cores; without a word of it, the tokenizers library warns at every later fork that it may deadlock.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with forgiving_output():
        try:
            with stopping_at_once():
                _require_folder()
                main(sys.argv[1:])
            return
        except QliteError as error:
            message, code = str(error), error.exit_code
        except (Stopped, KeyboardInterrupt) as stopped:
            message, code = "; ".join([interrupted, *getattr(stopped, "__notes__", ())]), getattr(stopped, "exit_code", 130)
        except Exception as error:
            message, code = _other(error)
        print(printable(message), file=sys.stderr)
    sys.exit(code)


def let_call(module: str, function: Callable) -> None:
    """Let the module of that name be called as ``function``, which stands in it under the module's own name.

    ``qlite.train`` is what ``python -m qlite.train`` runs, and ``from qlite import train`` has to give what trains. Importing a module
    puts it there under its name, whatever stood there; so it is the module that is made callable, by a class of its own, as the
    Python reference has it ("Customizing module attribute access").
    """
    namespace = {"__call__": staticmethod(function), "__signature__": property(lambda _: _signature(function))}
    sys.modules[module].__class__ = type("CallableModule", (ModuleType,), namespace)


def _signature(function: Callable) -> object:
    from inspect import signature  # here: --help does without

    return signature(function)


def _require_folder() -> None:
    """Raise MachineError if the folder in which this was typed has been deleted: no relative path means anything then."""
    try:
        os.getcwd()
    except OSError as error:
        raise MachineError("the folder in which this was typed is no longer there; change to another and give the command again") from error


def _other(error: Exception) -> tuple[str, int]:
    """Return message and exit code of an error that is none of ours."""
    from qlite.device import is_out_of_memory, out_of_memory_words  # here: it imports torch, which a verb's --help does without

    if is_out_of_memory(error):
        return out_of_memory_words(error), MachineError.exit_code
    text = "".join(traceback.format_exception(error))
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        where = f"where it happened is in {_keep_report(text)}; please report it with that file"
    except QliteError:
        where = f"please report it:\n{text}"
    return f"this is a mistake of qlite's own ({what}); {where}", 1


def _keep_report(text: str) -> Path:
    """Write what went wrong into the cache's folder of reports, beside the newest of those that are there; return its path."""
    from qlite.files import cache_folder, remove_file, write_text  # here: as above

    folder = cache_folder() / "reports"
    path = folder / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}.txt"
    write_text(path, text)
    for old in sorted(folder.glob("*.txt"))[:-KEPT_REPORTS]:
        remove_file(old)
    return path
