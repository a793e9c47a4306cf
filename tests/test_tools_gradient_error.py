"""The tool that holds gradients against float32's, on a tiny base: each side is near, and ours no farther than PEFT's."""

import tomli_w

from tests.tiny_run import tiny_tables
from tools import gradient_error


def test_each_side_is_near_and_ours_no_farther(tmp_path, capsys):
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(tiny_tables(tmp_path)))
    gradient_error.main([str(path), "--lines", "2", "--tokens", "40", "--seeds", "2"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| qlite", "| PEFT"))]
    found = {name.removeprefix("| "): float(value.split()[0]) for name, value in lines}
    assert {"qlite, torch's attention kernel", "PEFT, in bfloat16", "PEFT, prepared for k-bit training"} <= found.keys()
    assert all(0 < distance < 0.1 for distance in found.values())
    assert found["qlite, torch's attention kernel"] < 1.2 * found["PEFT, in bfloat16"]
