"""How much disk a run will need, asked before its first step: not after hours, at the first checkpoint."""

from pathlib import Path

from torch import nn

from qlite.formats.peft import adapter_tensors
from qlite.memory import terms
from qlite.memory.plan import MemoryPlan
from qlite.optim.build import FlatOptimizer
from qlite.recipe.schema import Output
from qlite.room import require_space
from qlite.training.forecast import STEP
from qlite.units import MIB

SMALL_FILES = 16 * MIB
"""Room for metrics, tables of tensors and whatever else is small."""
OWN = ("checkpoints", "best", "adapter")


def checkpoint_bytes(model: nn.Module, optimizer: FlatOptimizer) -> tuple[int, int]:
    """Return the bytes of what is trained, and of the optimizer's state: a checkpoint holds both."""
    return sum(tensor.nbytes for tensor in adapter_tensors(model).values()), sum(tensor.nbytes for tensor in optimizer.state()[0].values())


def planned_bytes(plan: MemoryPlan) -> tuple[int, int]:
    """Return the same by plan, before a weight is read."""
    held = plan.phases[STEP].terms
    return held.get(terms.ADAPTER, 0), held.get(terms.OPTIMIZER, 0)


def require_room(output: Output, sizes: tuple[int, int]) -> None:
    """Raise DiskError if the run's folder cannot hold what a run will write at most: a new checkpoint before an old one goes.

    ``sizes``: of the adapter and of the optimizer's state, in bytes.
    """
    adapter, state = sizes
    best = 2 * adapter if output.adapter == "best" else 0
    folder = Path(output.dir)
    # What the run has written before is a part of what it writes at most.
    own = sum(file.stat().st_size for name in OWN for file in folder.glob(f"{name}/**/*") if file.is_file())
    needed = (output.keep + 1) * (adapter + state) + adapter + best + SMALL_FILES
    require_space(folder, max(SMALL_FILES, needed - own), f"a run that keeps {output.keep} checkpoints (output.keep)")
