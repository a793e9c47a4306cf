"""Rules of the house that no single test sees: who may write, what is never called, what every system has."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlite.errors import install_line

PACKAGE = Path(__file__).resolve().parents[1] / "qlite"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Beside files.py: transformers writes its own files, into a folder that files.py gave; a lock is a file that nobody reads; and what is
# dropped goes to the null device.
WRITERS = {
    ("formats/merged.py", ".save_pretrained"),
    *(("lock.py", call) for call in ("os.open", "os.truncate", ".unlink", ".rmdir")),
    ("streams.py", "os.open"),
}
WRITING = {
    ".write_text", ".write_bytes", ".mkdir", ".rmdir", ".unlink", ".touch", ".save_pretrained", ".symlink_to", ".hardlink_to", ".chmod",
    "save_file", "os.open", "os.replace",
    "os.rename", "os.remove", "os.unlink", "os.makedirs", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod",
    "shutil.rmtree", "shutil.copy", "shutil.copyfile", "shutil.copytree", "shutil.move", "torch.save", "np.save", "pq.write_table",
    "tempfile.mkdtemp", "tempfile.mkstemp", "tempfile.NamedTemporaryFile", "tempfile.TemporaryDirectory", "tempfile.TemporaryFile",
}  # fmt: skip
NEVER = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "os.system", "os.popen", "os.fork", "joblib.load", "np.load"}
NOT_EVERYWHERE = {
    "os.fork", "os.kill", "os.killpg", "os.setsid", "os.getuid", "os.getgid", "os.sched_getaffinity", "os.mkfifo", "os.symlink", "os.uname",
    "os.pread", "os.pwrite", "os.getloadavg", "os.wait", "signal.SIGKILL", "signal.SIGHUP", "signal.SIGALRM", "signal.setitimer",
    "signal.alarm", "signal.pause",
}  # fmt: skip
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle", "yaml", "socket", "urllib", "http", "requests"}
UNIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline", "curses", "syslog", "multiprocessing"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call with its name: "open", ".mkdir" of any object, and "os.mkdir"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.func.id, node
            elif isinstance(node.func, ast.Attribute):
                yield f".{node.func.attr}", node
                if isinstance(node.func.value, ast.Name):
                    yield f"{node.func.value.id}.{node.func.attr}", node


def names(tree: ast.AST) -> Iterator[str]:
    """Yield every attribute of a module that is used, "os.fork"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def opens_to_write(name: str, call: ast.Call) -> bool:
    """Return whether ``call`` opens a file for anything but reading."""
    if name not in ("open", ".open"):
        return False
    place = 1 if name == "open" else 0
    given = [*call.args[place : place + 1], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [mode.value for mode in given if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    return any(set(mode) & set("wax+") for mode in modes)


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.AST]:
    assert len(MODULES) > 90
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}


def test_only_files_py_writes(trees):
    found = {
        (module, name)
        for module, tree in trees.items()
        for name, call in calls(tree)
        if module != "files.py" and (name in WRITING or opens_to_write(name, call))
    }
    assert found == WRITERS


def test_the_rule_sees_what_it_forbids():
    bad = "open('a', 'w')\nPath('a').open(mode='ab')\nPath('a').mkdir()\nos.replace('a', 'b')\n'a'.replace('b', 'c')\nopen('x')"
    found = [name for name, call in calls(ast.parse(bad)) if name in WRITING or opens_to_write(name, call)]
    assert found == ["open", ".open", ".mkdir", "os.replace"]


def test_nothing_unpickles_evaluates_or_runs_code_of_a_model(trees):
    used = {(module, name) for module, tree in trees.items() for name, _ in calls(tree) if name in NEVER}
    imported = {(module, name) for module, tree in trees.items() for name in imports(tree) if name in UNSAFE_MODULES}
    trusted = [module for module in trees if "trust_remote_code" in (PACKAGE / module).read_text(encoding="utf-8")]
    assert (used, imported, trusted) == (set(), set(), [])


def test_only_pip_is_ever_started(trees):
    assert {module for module, tree in trees.items() if "subprocess" in imports(tree)} == {"model/wheel.py"}


def test_nothing_is_used_that_only_some_systems_have(trees):
    imported = {(module, name) for module, tree in trees.items() for name in imports(tree) if name in UNIX_MODULES}
    used = {(module, name) for module, tree in trees.items() for name in names(tree) if name in NOT_EVERYWHERE}
    # On macOS alone, where it is the only way to flush a drive.
    assert (imported, used) == ({("files.py", "fcntl")}, set())


def test_every_text_file_is_read_as_utf8(trees):
    """Windows would take its own code page."""
    bad = []
    for module, tree in trees.items():
        for name, call in calls(tree):
            keywords = {keyword.arg for keyword in call.keywords}
            if name in (".read_text", ".write_text") and isinstance(call.func, ast.Attribute) and "encoding" not in keywords:
                bad.append((module, call.lineno))
    assert bad == []


def test_extras_are_installed_as_the_readme_says():
    """qlite is on no package index: "pip install 'qlite[wandb]'" would find nothing, or somebody else's."""
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    lines = [line for path in MODULES for line in path.read_text(encoding="utf-8").splitlines() if "pip install" in line and "[" in line]
    assert install_line("wandb") in readme
    assert len(lines) == 2
    assert all("pip install -e '.[" in line for line in lines)
