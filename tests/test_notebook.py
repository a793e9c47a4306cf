"""README's story in a real notebook: its kernel, its outputs, an interrupt, and what a saved one holds."""

import ast
import json
import os
import re
import sys
from pathlib import Path

import pytest
import tomli_w

from tests.tiny_run import tiny_tables

nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[test]' brings nbclient and ipykernel")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parents[1]
STORY = {
    "import": "import json, os, signal\nfrom qlite import Recipe, Sampling, evaluate, export, generate, plan, report, train",
    "recipe": "recipe = Recipe.from_tables(json.loads(open('tables.json').read()))",
    "plan": "plan(recipe, gpu='RTX 3060')",
    "train": "result = train(recipe)\nresult",
    "curve": "result.losses",
    "generate": "generate(result, ['abc', 'fade'], base=True, sampling=Sampling(max_tokens=6))",
    "evaluate": "evaluate(result, metrics='loss')",
    "export": "export(result, merge='fp16')",
    "report": "report(result)",
    "mistake": "train('nothing.toml')",
    "interrupted": """
from qlite.training.notebook import NotebookConsole
long = Recipe.from_tables(json.loads(open('tables.json').read()), {"output.dir": "long", "train.steps": 5000})
step = NotebookConsole.step
def interrupt_after_two(console, report):
    step(console, report)
    if report.step == 2:
        os.kill(os.getpid(), signal.SIGINT)  # what a notebook's stop button sends
handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
NotebookConsole.step = interrupt_after_two
train(long)
""",
    "afterwards": "(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers, os.listdir('long/checkpoints')",
    "command": "!{python} -m qlite.train mine.toml train.steps=2 output.dir=typed",
}


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> dict:
    """The cells of the notebook after it ran, by name."""
    folder = tmp_path_factory.mktemp("notebook")
    # In float32: the logits of a tiny base are so near to each other that bfloat16 ties them, and rounding would decide an answer.
    base = {"fused": False, "dtype": "float32"}
    tables = tiny_tables(folder, base=base, train={"steps": 40, "accumulation": 1, "eval_every": 10}, memory={"plan": "tell"})
    (folder / "tables.json").write_text(json.dumps(tables), encoding="utf-8")
    (folder / "mine.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
    cells = [nbformat.v4.new_code_cell(source.replace("{python}", sys.executable)) for source in STORY.values()]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("QLITE_CACHE", str(folder / "cache"))
        # The kernel of this very Python, whatever kernels are installed under the name.
        manager = pytest.importorskip("jupyter_client").AsyncKernelManager(kernel_name="python3")
        manager.kernel_spec.argv[0] = sys.executable
        client = nbclient.NotebookClient(
            notebook, km=manager, allow_errors=True, timeout=300, resources={"metadata": {"path": str(folder)}}
        )
        client.execute()
    nbformat.validate(notebook)
    return dict(zip(STORY, notebook.cells, strict=True))


def shown(cell) -> str:
    """Return what a cell shows, as text."""
    return "\n".join(output.get("text") or output.data["text/plain"] for output in cell.outputs if output.output_type != "error")


@pytest.mark.slow
def test_readmes_story_runs_and_every_result_shows_itself(story):
    for name in ("import", "recipe", "plan", "train", "curve", "generate", "evaluate", "export", "report"):
        assert not [output for output in story[name].outputs if output.output_type == "error"], name
    words = {
        "plan": ("all tensors", "verdict    fits RTX 3060"),
        "train": ("step 40/40", "finished", "trained      40 steps", "exact match", "written to"),
        "generate": ("> abc\nbase   ", "\ntuned  ", "> fade"),
        "evaluate": ("perplexity", "held-out: 7 rows"),
        "export": ("wrote ", "KL ", "greedy answers the same 7 of 7"),
        "report": ("report.html",),
    }
    for name, parts in words.items():
        for part in parts:
            assert part in shown(story[name]), (name, part)
    losses = ast.literal_eval(story["curve"].outputs[-1].data["text/plain"])
    assert list(losses) == list(range(1, 41))
    assert losses[40] < losses[1]


@pytest.mark.slow
def test_a_saved_notebook_holds_a_run_once_and_is_small(story):
    kinds = [output.output_type for output in story["train"].outputs]
    assert kinds == ["display_data", "execute_result"]
    assert all({"text/html", "text/plain"} == set(output.data) for output in story["train"].outputs)
    assert shown(story["train"]).count("step 40/40") == 1
    assert len(json.dumps(story["train"])) < 60_000


@pytest.mark.slow
def test_a_mistake_is_its_message_and_no_traceback(story):
    (output,) = story["mistake"].outputs
    (line,) = output.traceback
    assert line.startswith("RecipeError: nothing.toml: cannot read the recipe (No such file or directory)")


@pytest.mark.slow
def test_the_stop_button_leaves_a_checkpoint_and_the_kernel_as_it_was(story):
    error = story["interrupted"].outputs[-1]
    assert error.ename == "Interrupted"
    assert error.traceback[1] == "The same call goes on from the newest checkpoint, if one was written."
    assert "stopped by SIGINT after step 2" in shown(story["interrupted"])
    assert "interrupted at step 2" in shown(story["interrupted"])
    assert "(True, ['step-00000002" in shown(story["afterwards"])


@pytest.mark.slow
def test_a_command_typed_in_a_cell_prints_lines_and_moves_no_cursor(story):
    assert "trained      2 steps" in shown(story["command"])
    assert not re.search(r"\x1b\[\d*[A-HJKf]", shown(story["command"]))
