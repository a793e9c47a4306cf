"""The server of victims, and how a test tells its figure."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.tiny_run import tiny_tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tell(record_property) -> Callable[[str], None]:
    """Print a figure at the end of the tests."""
    return partial(record_property, "figure")


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Callable[..., dict]]:
    """Train in a forked process: ``server(folder, changes, faults={...}, ...)`` returns how it ended."""
    if not hasattr(os, "fork"):
        pytest.skip("victims are forked, which this system cannot")
    cache = tmp_path_factory.mktemp("cache")
    variables = {**os.environ, "QLITE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.crash.victims"]
    process = subprocess.Popen(command, cwd=ROOT, env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(folder: Path, changes: dict, **job: object) -> dict:
        tiny_tables(folder)  # base and rows are made here, so that victims only read them
        process.stdin.write(json.dumps({"folder": str(folder), "changes": changes, **job}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait()
