"""The tools that hold an export against its run: what is another is told, and nothing compared is no success."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlite import export
from qlite.errors import ExportError, RecipeError, RunError
from tests.tiny_run import run, tiny_recipe
from tools import check_export, check_gguf


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run in float32, where the order of sums changes no answer, with its merged folder."""
    folder = tmp_path_factory.mktemp("checked")
    recipe = tiny_recipe(folder, train={"steps": 12, "eval_every": 0}, optimizer={"lr": 2e-2}, base={"dtype": "float32"})
    run(recipe)
    export.main(["--merge", "--dtype", "fp32", "--device", "cpu", str(folder / "run"), "--out", str(folder / "run" / "merged-fp16")])
    return folder / "run"


def test_equal_answers_are_counted(finished, capsys):
    check_export.main([str(finished), "--prompts", "5"])
    assert "5 of 5 greedy answers are the same" in capsys.readouterr().out


def test_other_weights_answer_otherwise_and_are_told(finished, tmp_path, capsys):
    shutil.copytree(finished / "merged-fp16", tmp_path / "other")
    (file,) = (tmp_path / "other").glob("*.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ExportError, match="answers differ"):
        check_export.main([str(finished), "--export", str(tmp_path / "other"), "--prompts", "5"])
    assert "run:" in capsys.readouterr().out
    tensors.pop(next(name for name in tensors if "q_proj" in name))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ExportError, match=r"its weights are not those that its config\.json describes"):
        check_export.main([str(finished), "--export", str(tmp_path / "other"), "--prompts", "5"])


def test_nothing_asked_and_nothing_there_are_no_success(finished, tmp_path):
    for tool in (check_export, check_gguf):
        with pytest.raises(RecipeError, match="--prompts 0: should be 1 or more"):
            tool.main([str(finished), "--prompts", "0"])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "rows.txt").write_text("".join(f"face {i} bead\n\n" for i in range(40)))
    data = {"train": str(tmp_path / "text" / "rows.txt"), "test": "", "held_out_rows": 3}
    run(tiny_recipe(tmp_path / "text", data=data, train={"steps": 2, "exact_match_rows": 0, "eval_every": 0}))
    with pytest.raises(RecipeError, match="no held-out row of this run asks a question; nothing was compared"):
        check_export.main([str(tmp_path / "text" / "run")])
    with pytest.raises(RunError, match="is no merged folder; first: python -m qlite.export --merge"):
        check_export.main([str(finished), "--export", str(tmp_path), "--prompts", "1"])
    with pytest.raises(RunError, match=r"gguf-q8_0\" is not there; first: python -m qlite\.export --gguf q8_0 "):
        check_gguf.main([str(finished), "--type", "q8_0"])
    with pytest.raises(RunError, match=r"gguf-adapter\" is not there; first: python -m qlite\.export --gguf-adapter "):
        check_gguf.main([str(finished), "--adapter"])
