"""The latency tool on its tiny model: a row for every side, and every figure to the base's of the same rounds."""

import re
from dataclasses import replace

import pytest
import torch

from qlite.serving.bank import BASE
from tools import latency
from tools.latency import Times, cell


def test_every_side_has_its_row_and_the_base_is_1_to_itself(capsys):
    latency.main(["--rounds", "1", "--prompt", "6", "--tokens", "2", "--batches", "1", "8", "--device", "cpu"])
    out = capsys.readouterr().out
    tables = dict(zip(*[iter(re.split(r"batch of (\d+)\n", out.partition("8 rows over")[0])[1:])] * 2, strict=True))
    rows = {batch: [line.strip() for line in text.splitlines()[1:] if line.strip()] for batch, text in tables.items()}
    assert len(rows["1"]) == 3 * 4 + 1
    assert len(rows["8"]) == 3 * 5 + 1
    assert sum("bottleneck" in row for row in rows["8"]) == 3
    assert sum("merged" in row for row in rows["8"]) == 1
    for row in rows["8"]:
        assert len(re.findall(r"\d+\.\d\d  \d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", row)) == 2
        assert (row.count("1.00 (1.00 to 1.00)") == 2) or f" {BASE} " not in row
    for bits in (16, 8, 4):
        assert f"8 rows over {bits} bit" in out
    assert out.count("one after another") == 3


def test_a_ratio_is_that_of_the_same_round():
    slow, quick = Times(0.2, 0.02, 1.0), Times(0.1, 0.01, 0.5)
    found = cell([slow, quick, slow], [quick, quick, slow], "first_seconds")
    assert found.split() == ["200.00", "1.00", "(1.00", "to", "2.00)"]


@torch.no_grad()
def test_what_is_merged_is_what_stands_beside_the_base(tmp_path):
    base = latency._tiny_base(tmp_path)
    bank, cpu = latency.open_bank(replace(base, bits=16), torch.device("cpu")), torch.device("cpu")
    ids = latency.random_ids(bank.model, 2, 5, cpu)
    bank.use("LoRA, rank 8")
    expected = bank.model(input_ids=ids).logits
    found = latency.merged_model(replace(base, bits=16), cpu)(input_ids=ids).logits
    bank.use(BASE)
    assert float((found - expected).abs().max()) == pytest.approx(0, abs=1e-5)
    assert float((bank.model(input_ids=ids).logits - expected).abs().max()) > 1e-3
