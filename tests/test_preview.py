"""What a recipe's data looks like is shown before a weight is loaded, and a data set that would be refused ends with exit code 2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from qlite import preview
from qlite.data.batches import TokenBatches
from qlite.data.encode import Encoded
from qlite.data.figures import Spread, histogram, useful_share
from qlite.errors import DataError, RecipeError
from tests.tiny_run import tiny_tables


def recipe_file(folder: Path, **changes: dict) -> str:
    path = folder / "mine.toml"
    path.write_text(tomli_w.dumps(tiny_tables(folder, **changes)))
    return str(path)


def shown(folder: Path, capsys, *arguments: str, **changes: dict) -> str:
    preview.main([recipe_file(folder, **changes), *arguments])
    return capsys.readouterr().out


def test_counts_lengths_padding_and_a_row_are_shown(tmp_path, capsys):
    out = shown(tmp_path, capsys)
    # A line may end inside the path.
    assert 'train.jsonlinformat"prompt"(foundfromitsfirstrows)' in "".join(out.split())
    assert re.search(r"data.train +│ +40 │ +40 │ +40 │ +0 ", out)
    assert re.search(r"data.test +│ +7 │ +7 │ +0 │ +7 ", out)
    words = [json.loads(line)["prompt"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    # ChatML: <|im_start|> user \n word <|im_end|> \n <|im_start|> assistant \n, and the word again with <|im_end|>.
    tokens = [1 + 4 + 1 + len(word) + 1 + 1 + 1 + 9 + 1 + len(word) + 1 for word in words]
    assert f"tokens a row {min(tokens)} to {max(tokens)}, half at most {int(np.median(tokens))}" in out
    assert f"trained tokens {1 + min(map(len, words))} to {1 + max(map(len, words))}" in " ".join(out.split())
    assert "nothing is longer than train.tokens = 64" in out
    assert re.search(r"padded \(the recipe's\)\s+│\s+7 │", out)
    assert f"⟦{words[0][::-1]}<|im_end|>⟧" in out
    assert "an answer ends at: <eos>, <|im_end|>" in out


def test_another_row_can_be_asked_for(tmp_path, capsys):
    words = [json.loads(line)["prompt"] for line in Path(tiny_tables(tmp_path)["data"]["train"]).read_text().splitlines()]
    assert f"⟦{words[11][::-1]}<|im_end|>⟧" in shown(tmp_path, capsys, "--row", "12")
    with pytest.raises(RecipeError, match="--row 41: there are 40 training rows"):
        shown(tmp_path, capsys, "--row", "41")


def test_what_would_be_cut_is_shown_and_then_refused(tmp_path, capsys):
    with pytest.raises(DataError, match=r"train.tokens = 30: .* of data.train are longer"):
        shown(tmp_path, capsys, train={"tokens": 30}, data={"long_rows": "cut_end"})
    out = capsys.readouterr().out
    assert "longer than train.tokens" in out
    assert "are cut at their end" in out


def test_text_that_would_steer_the_terminal_is_cleaned(tmp_path, capsys):
    tiny_tables(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a\x1b[2Jb [red]", "completion": "c"}) + "\n")
    (tmp_path / "train.jsonl").rename(tmp_path / "x[red].jsonl")
    out = shown(tmp_path, capsys, data={"train": str(tmp_path / "x[red].jsonl")})
    assert "\x1b" not in out
    assert "b [red]" in out
    assert "x[red].jsonl" in out


@pytest.mark.slow
def test_no_weight_is_read_and_the_exit_code_is_trains(tmp_path):
    path = recipe_file(tmp_path)
    (tmp_path / "base" / "model.safetensors").write_bytes(b"no weights")
    command = [sys.executable, "-m", "qlite.preview", path]
    environment = {**os.environ, "QLITE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*command, "train.tokens=30"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "train.tokens = 30" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_terminal_without_the_characters_gets_others(tmp_path):
    command = [sys.executable, "-m", "qlite.preview", recipe_file(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "QLITE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"tokens are trained" in done.stdout


def test_histogram_counts_every_row_once_in_steps_of_round_width():
    lengths = np.array([1, 49, 50, 51, 100, 512])
    bins = histogram(lengths, 12)
    assert sum(count for _, _, count in bins) == 6
    assert bins[0] == (1, 43, 1)
    assert all(high - low + 1 == 43 for low, high, _ in bins)
    assert bins[-1][0] <= 512 <= bins[-1][1]


def test_spread_and_useful_share_are_as_computed_by_hand():
    assert Spread.of(np.array([3, 1, 2, 100])) == Spread(1, 2, 100, 100)
    rows = [Encoded([1] * n, [True] * n) for n in (10, 6, 4, 2)]
    assert useful_share(TokenBatches(rows, 2, 1, 0, 0)) == pytest.approx(22 / (2 * 10 + 2 * 4))
    assert useful_share(TokenBatches(rows, 2, 1, 0, 0, pack_tokens=12)) == pytest.approx(22 / 24)
