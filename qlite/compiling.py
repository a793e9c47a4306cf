"""Functions of tensors compiled by torch's inductor (C++ on a CPU), once a machine: later runs read what it made.

torch.compile traces each function anew in every process, in seconds, and asks at every call whether it may use what it compiled.
Here the sizes are symbols from the start, and what is kept on disk is called as it is.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from qlite import device as machine
from qlite.errors import MachineError
from qlite.files import MANIFEST, cache_folder, can_be_written, drop_oldest, mark_used, new_folder
from qlite.hashes import short_hash
from qlite.units import MIB

CACHE_BYTES = 64 * MIB
"""All kept kernels together; those used longest ago go first."""
FOLDER_OF_INDUCTOR, TRITON_FOLDER = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
# Of what is loaded on the examples, to what the function itself gives: as far as sums in another order lie apart.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Args = tuple[Tensor, ...]
Compiled = Callable[..., Tensor | list[Tensor] | None]


def compiled(
    functions: dict[str, Callable], examples: Callable[[], dict[str, Args]], source: Path, device: torch.device, dtype: torch.dtype
) -> dict[str, Compiled]:
    """Return each of ``functions`` compiled, read from the cache where this machine has compiled it before.

    examples: makes arguments for each, which show what it takes: every size but 1 may be another in a call, none may be 0.
    source: the file that they stand in. What is written there, machine and versions decide what is found in the cache.

    Raises:
        Exception: there is no compiler, or one that fails; a kernel that computes something else than its function.
    """
    _keep_machine_code()
    facts = [file.read_text(encoding="utf-8") for file in (source, Path(__file__))]
    facts += [torch.__version__, version("bitsandbytes"), sys.version, machine.architecture(device), str(dtype)]
    folder = cache_folder() / "kernels" / short_hash(json.dumps(facts))
    # Whoever follows this program's tensors has no business with the compiler's, which have symbols for sizes.
    with _disable_current_modes():
        args = examples()
        return _read(folder, functions, args) or _make(folder, functions, args)


def _keep_machine_code() -> None:
    """Let inductor keep its files in our cache, unless the user names another place: by default they are gone when a machine restarts."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Machine code for this processor alone: a home folder can be seen from several machines, and inductor does not tell them apart.
    folder = cache_folder() / "inductor" / short_hash(machine.architecture(torch.device("cpu")))
    is_default = os.environ.get(FOLDER_OF_INDUCTOR) in (None, default_cache_dir())  # it is written there when inductor is imported
    if is_default and " " not in str(folder) and can_be_written(folder):  # inductor's command lines break at a space
        os.environ[FOLDER_OF_INDUCTOR] = str(folder)


def keep_triton_code() -> None:
    """Let Triton keep its machine code in our cache, unless the user names another place: a home folder may be read-only."""
    folder = cache_folder() / "triton"
    if TRITON_FOLDER not in os.environ and can_be_written(folder):
        os.environ[TRITON_FOLDER] = str(folder)


def _read(folder: Path, functions: dict[str, Callable], args: dict[str, Args]) -> dict[str, Compiled] | None:
    if not (folder / MANIFEST).is_file():
        return None
    from torch._inductor import CompiledArtifact

    try:
        made = {name: _returning(CompiledArtifact.load(path=str(folder / name))) for name in functions}
        check(functions, made, args)
    except Exception:  # of another version, or damaged: it is made anew
        return None
    mark_used(folder)
    return made


def _make(folder: Path, functions: dict[str, Callable], args: dict[str, Args]) -> dict[str, Compiled]:
    artifacts = {name: _compile(function, args[name]) for name, function in functions.items()}
    made = {name: _returning(artifact) for name, artifact in artifacts.items()}
    check(functions, made, args)
    # A full or read-only disk stops no run; nor does an inductor that was told to keep nothing, and so has nothing to save.
    with suppress(MachineError, RuntimeError, AssertionError):
        with new_folder(folder) as new:
            for name, artifact in artifacts.items():
                artifact.save(path=str(new / name))
        drop_oldest(folder.parent, CACHE_BYTES, keep=folder)
    return made


def _compile(function: Callable, args: Args):
    """Return ``function`` as inductor's artifact, for arguments of any sizes."""
    from torch._inductor import standalone_compile
    from torch.export import Dim, export

    class Module(nn.Module):
        def forward(self, *args: Tensor):
            return function(*args)

    sizes = tuple([Dim.STATIC if size == 1 else Dim.DYNAMIC for size in arg.shape] for arg in args)
    graph = export(Module(), args, dynamic_shapes=(sizes,)).graph_module
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    return standalone_compile(graph, inputs, dynamic_shapes="from_graph")


def _returning(artifact) -> Compiled:
    def call(*args: Tensor) -> Tensor | list[Tensor]:
        results = artifact(*args)
        return results[0] if len(results) == 1 else results

    return call


def check(functions: dict[str, Callable], made: dict[str, Compiled], args: dict[str, Args]) -> None:
    """Raise RuntimeError if one of ``made`` makes other numbers than its function, in its results or in the arguments that it changes.

    One that gives None only changes arguments.
    """
    for name, function in functions.items():
        mine, theirs = ([arg.clone() for arg in args[name]] for _ in range(2))
        found, right = made[name](*mine), function(*theirs)
        pairs = list(zip(mine, theirs, strict=True))
        if found is not None:
            pairs += zip(_as_list(found), _as_list(right), strict=True)
        for ours, other in pairs:
            bound = TOLERANCE.get(other.dtype, 0) * (1 + other.abs().max().item())
            if not (ours - other).abs().max() <= bound:
                raise RuntimeError(f"the compiled {name} computes something else than it should")


def _as_list(results: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [results] if isinstance(results, Tensor) else results
