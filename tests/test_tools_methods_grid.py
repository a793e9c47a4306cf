"""tools/methods_grid.py reads pytest's report right; tools/sweep_speed.py times tiny runs together and alone."""

import re
from pathlib import Path

import pytest
import tomli_w

from qlite.errors import ExportError
from tests.tiny_run import tiny_tables
from tools import methods_grid, sweep_speed

REPORT = """<testsuites><testsuite>
<testcase name="test_it_learns[lora-16 bit]"/><testcase name="test_it_learns[lora-4 bit]"/>
<testcase name="test_it_merges[lora-4 bit]"/><testcase name="test_it_learns[lora-8 bit]"><failure message="no"/></testcase>
<testcase name="test_it_learns[full-16 bit]"/><testcase name="test_it_learns[full-4 bit]"><skipped message="needs 16 bit"/></testcase>
<testcase name="test_of_no_storage"/>
</testsuite></testsuites>"""


def test_the_grid_counts_laws_by_cell_tells_gaps_with_their_reason_and_names_what_is_broken(tmp_path, capsys):
    (tmp_path / "laws.xml").write_text(REPORT)
    assert methods_grid.print_grid(tmp_path / "laws.xml") == ["test_it_learns[lora-8 bit]"]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["lora", "1", "-", "2"]
    assert lines[2] == ["full", "1", "-", "-", "needs", "16", "bit"]
    assert lines[-1] == ["4", "laws", "hold,", "1", "are", "broken"]


def test_a_broken_law_is_an_error(monkeypatch, capsys):
    def reports(command, **_):
        (path,) = (part.partition("=")[2] for part in command if part.startswith("--junitxml"))
        Path(path).write_text(REPORT)

    monkeypatch.setattr(methods_grid.subprocess, "run", reports)
    with pytest.raises(ExportError, match=r"1 laws are broken: test_it_learns\[lora-8 bit\]"):
        methods_grid.main([])
    assert "4 laws hold" in capsys.readouterr().out


def test_runs_are_timed_together_and_one_after_another(tmp_path, capsys):
    tables = tiny_tables(tmp_path, train={"accumulation": 1, "eval_every": 0, "exact_match_rows": 0})
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(tables))
    sweep = {"recipe": str(tmp_path / "tiny.toml"), "runs": {f"r{rank}": {"method": {"rank": rank}} for rank in (2, 4, 8)}}
    (tmp_path / "sweep.toml").write_text(tomli_w.dumps(sweep))
    sweep_speed.main([str(tmp_path / "sweep.toml"), "--rounds", "2"])
    out = capsys.readouterr().out
    assert "3 runs, 2 rounds" in out
    ratio, least, most = map(float, re.search(r"takes ([\d.]+) times as long \(([\d.]+) to ([\d.]+)\)", out).groups())
    assert 0 < least <= ratio <= most
    planned = out.splitlines()[-1].partition("planned at most: ")[2]
    assert len(re.findall(r"[\d.]+ [KM]iB", planned)) == 4
