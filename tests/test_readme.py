"""README says nothing that is not so: its recipe parses, its files exist, and (slow) its first command does what it says."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from qlite.recipe.read import build_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_recipe_shown_is_a_recipe():
    (shown,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    build_recipe(tomllib.loads(shown), "README.md")


def test_every_file_named_exists():
    named = set(re.findall(r"(?:recipes|tools|tests|qlite)/[\w./]+\.(?:py|toml|md)", README))
    assert len(named) > 5
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_ci_runs_the_test_command_of_readme():
    command = "pip install -e '.[test]' && pytest"
    assert f"\n{command}\n" in README
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_quickstart_reaches_90_of_100_within_4_minutes(smollm2_files, tmp_path):
    start = time.monotonic()
    command = [sys.executable, "-m", "qlite.train", "recipes/quickstart.toml", f"output.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 240
    before, after = json.loads((tmp_path / "run" / "result.json").read_text())["answers"]
    assert before["exact"] <= 5
    assert after["exact"] >= 90
    assert "exact match" in done.stdout
