"""An export that is killed, or that the disk refuses, leaves no half model under a final name; and it can be done again."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from qlite.files import is_whole
from qlite.hashes import sha256
from tests.crash.faults import KILLED, said
from tests.crash.test_kills import SHORT

pytestmark = pytest.mark.crash


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory) -> Path:
    """A folder with a finished run, and its export as it should be."""
    folder = tmp_path_factory.mktemp("export")
    assert server(folder, SHORT)["code"] == 0
    (folder / "out").mkdir()
    ended = server(folder, SHORT, export=str(folder / "out" / "whole"), inside="out", log=str(folder / "log"))
    assert ended["code"] == 0
    return folder


def test_killed_at_any_file_operation_it_leaves_no_half_model_and_is_done_again(server, trained, tell):
    calls, expected, out, good = len(said(trained / "log")[0]), hashes(trained / "out" / "whole"), trained / "out" / "victim", 0
    for number in range(calls):
        for when in ("die_before", "die_after"):
            ended = server(trained, SHORT, export=str(out), inside="out", faults={when: number})
            assert ended["code"] == KILLED, (number, when)
            assert not out.exists() or is_whole(out)
            options = ["--force"] if out.exists() else []
            assert server(trained, SHORT, export=str(out), inside="out", options=options)["code"] == 0
            assert [path.name for path in (trained / "out").iterdir() if path.name != "whole"] == ["victim"], "something is left"
            good += hashes(out) == expected
            shutil.rmtree(out)
    tell(f"export killed before and after every file operation: {good}/{2 * calls} were done again with the same bytes")
    assert good == 2 * calls


def test_a_gguf_file_killed_at_any_file_operation_is_whole_or_not_there(server, trained, tell):
    out, good = trained / "out" / "gguf", 0
    job = {"export": str(out), "inside": "out", "what": ["--gguf-adapter"]}
    assert server(trained, SHORT, **job, log=str(trained / "gguf-log"))["code"] == 0
    calls, expected = len(said(trained / "gguf-log")[0]), hashes(out)
    assert "run-lora.gguf" in expected
    shutil.rmtree(out)
    for number in range(calls):
        assert server(trained, SHORT, **job, faults={"die_after": number})["code"] == KILLED
        assert not out.exists() or is_whole(out)
        assert server(trained, SHORT, **job, options=["--force"])["code"] == 0
        assert [path.name for path in (trained / "out").iterdir() if path.name != "whole"] == ["gguf"], "something is left"
        good += hashes(out) == expected
        shutil.rmtree(out)
    tell(f"export of a GGUF file killed after every file operation: {good}/{calls} were done again with the same bytes")
    assert good == calls > 5


@pytest.mark.parametrize("kind", ["open", "write", "fsync", "mkdir", "replace"])
def test_a_disk_that_refuses_leaves_nothing_behind_and_the_old_export_as_it_was(server, trained, kind):
    before = hashes(trained / "out" / "whole")
    faults = {"refuse": 0, "error": errno.ENOSPC, "only": [kind]}
    for out, options in ((trained / "out" / "new", []), (trained / "out" / "whole", ["--force"])):
        ended = server(trained, SHORT, export=str(out), inside="out", options=options, faults=faults)
        assert ended["code"] == 3
        assert "No space left on device" in said(trained / "told")[-1]
    assert hashes(trained / "out" / "whole") == before
    assert [path.name for path in (trained / "out").iterdir()] == ["whole"]


def test_an_export_that_is_there_is_not_written_over(server, trained):
    before = hashes(trained / "out" / "whole")
    assert server(trained, SHORT, export=str(trained / "out" / "whole"), inside="out")["code"] == 2
    assert "exists already" in said(trained / "told")[-1]
    assert hashes(trained / "out" / "whole") == before
    manifest = json.loads((trained / "out" / "whole" / "manifest.json").read_text())
    assert set(manifest) == set(before) - {"manifest.json"}


def test_killed_while_it_replaces_an_old_export_one_of_both_is_there_and_whole(server, trained, tell):
    """Between two renames there is none of that name; the next export puts the old one back before it begins."""
    out, before, good = trained / "out" / "again", hashes(trained / "out" / "whole"), 0
    shutil.copytree(trained / "out" / "whole", out)
    forced = {"export": str(out), "inside": "out", "options": ["--force"]}
    assert server(trained, SHORT, **forced, log=str(trained / "forced"))["code"] == 0
    calls = len(said(trained / "forced")[0])
    for number in range(calls):
        assert server(trained, SHORT, **forced, faults={"die_after": number})["code"] == KILLED
        assert server(trained, SHORT, **forced, faults={"refuse": 0, "only": ["write"]})["code"] == 3  # begins, and fails
        good += hashes(out) == before
    tell(f"killed while an export replaces another: one of both was there, whole, in {good}/{calls}")
    assert good == calls
