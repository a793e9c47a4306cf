"""The house's rules, held by reading the source: imports go down only, and every foreign surface has its owners."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qlite"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYER = {
    **dict.fromkeys(("errors", "units", "hashes", "table", "cpu_products", "card_kernels", "streams", "stopping"), -1),
    **dict.fromkeys(("files", "room", "lock", "given", "device", "offload", "verb", "compiling", "calls"), 0),
    **dict.fromkeys(("quant", "model", "methods", "optim", "data", "formats", "loggers"), 1),
    "recipe": 2,
    **dict.fromkeys(("serving", "training", "memory", "reporting", "analysis"), 3),
    **dict.fromkeys(("train", "export", "generate", "evaluate", "preview", "plan", "report", "combine", "swap", "sweep", "analyze"), 4),
    "chat": 5,  # generate, turn after turn
}
# What may be imported sideways, within one layer.
NEIGHBOURS = {
    "model": {"quant"},
    "methods": {"quant", "model"},
    "formats": {"methods", "model", "quant"},
    "training": {"serving", "memory", "reporting"},
    "reporting": {"memory"},
    "analysis": {"reporting"},
    "units": {"errors"},
    "stopping": {"errors"},
    "verb": {"device", "files"},
    "files": {"room"},
    "lock": {"files", "room"},
    "compiling": {"device", "files"},
    "calls": {"compiling", "device"},
}
# Who may touch a foreign surface. Everything else goes through them.
OWNERS = {
    "bitsandbytes": {"quant/linear.py", "quant/nf4.py", "quant/card_dense.py", "optim/build.py"},
    "triton": {"card_kernels.py"},
    "pynvml": {"device.py"},
    "psutil": {"device.py", "files.py"},
    "filelock": {"lock.py"},
    "jinja2": {"data/sandbox.py", "data/template.py", "data/encode.py"},
    "huggingface_hub": {"model/source.py", "model/gguf_architecture.py", "training/pushing.py"},
    "datasets": {"data/hub.py"},
    "pyarrow": {"data/tables.py"},
    "rich": {
        "training/console.py",
        "training/panel.py",
        "training/gauges.py",
        "training/summary.py",
        "training/comparison.py",
        "training/notebook.py",
        "training/result.py",
        "training/shown.py",
        "recipe/keys.py",
        "analyze.py",
        "evaluate.py",
        "export.py",
        "generate.py",
        "plan.py",
        "preview.py",
    },
    "IPython": {"training/notebook.py"},
    "tomli_w": {"recipe/write.py"},
    "sacrebleu": {"serving/metrics.py"},
    "rouge_score": {"serving/metrics.py"},
    "peft": set(),
    "torch.utils.tensorboard": {"loggers/tensorboard.py"},
    "wandb": {"loggers/wandb.py"},
    "mlflow": {"loggers/mlflow.py"},
}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_file_has_a_layer():
    assert {part_of(path) for path in FILES} - {"__init__"} == set(LAYER)
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down_only(path):
    own = part_of(path)
    wrong = set()
    for name in imports_of(path):
        if name.startswith("qlite.") and own != "__init__":
            other = name.split(".")[1]
            down = LAYER.get(other, 0) < LAYER[own]
            if not (other == own or down or other in NEIGHBOURS.get(own, ()) or other == "__version__"):
                wrong.add(name)
    assert wrong == set()


@pytest.mark.parametrize("surface", OWNERS)
def test_a_foreign_surface_is_touched_by_its_owners_only(surface):
    users = {name_of(path) for path in FILES if any(n == surface or n.startswith(surface + ".") for n in imports_of(path))}
    assert users == OWNERS[surface]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_device_and_offload_speak_to_cuda(path):
    tree, own = ast.parse(path.read_text(encoding="utf-8")), name_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert own in ("device.py", "offload.py"), f"{own}:{node.lineno} uses torch.cuda"


def test_files_keep_to_their_size():
    lines = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert lines["training/run.py"] <= 200
    assert {name: count for name, count in lines.items() if count > 400} == {}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_keep_to_their_size_and_every_public_thing_is_described(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or path.name == "__init__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            limit = 75 if node.name == "train" else 60  # the main path is read in one sitting, top to bottom
            assert node.end_lineno - node.lineno < limit, f"{node.name} is {node.end_lineno - node.lineno} lines long"
            count = len(node.args.args) + len(node.args.kwonlyargs)
            assert count <= 8, f"{node.name} takes {count} parameters"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
