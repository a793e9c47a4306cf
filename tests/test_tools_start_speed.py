"""The tool that times starts ends each of them at its first step."""

import re

import tomli_w

from tests.tiny_run import tiny_tables
from tools import start_speed


def test_a_start_ends_where_the_first_step_would_begin(tmp_path, capsys):
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(tiny_tables(tmp_path)))
    assert start_speed.main([str(path), "--times", "1"]) == 0
    assert re.search(r"^first \d+\.\d s, later", capsys.readouterr().out, re.MULTILINE)
    assert not (tmp_path / "run").exists()
