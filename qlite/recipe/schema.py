"""The recipe: nine tables, each a frozen dataclass. ``python -m qlite.train --keys`` prints what stands under the fields."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from qlite.data.dataset import Data
from qlite.methods import METHODS, Method
from qlite.model.load import Base
from qlite.optim.build import Optimizer
from qlite.optim.schedule import Schedule
from qlite.table import Table

Count = Annotated[int, Field(ge=1)]
Every = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class Train(Table):
    """How much is trained at a time, and for how long."""

    steps: Count | None = None
    """Optimizer steps of the run; or give epochs."""
    epochs: Count | None = None
    """Passes over the training rows; or give steps."""
    micro_batch: Count = 1
    """Rows that go through the model together."""
    accumulation: Count = 16
    """Micro-batches whose gradients make one optimizer step."""
    tokens: Annotated[int, Field(ge=2)] = 512
    """Longest row in tokens; longer rows are left out (raw text is cut into pieces), and the run says how many."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest L2 norm of a step's gradient; 0: no clipping."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the adapter's start, the order of rows and dropout."""
    eval_every: Every = 0
    """Steps between evaluations on the held-out rows; 0: only at the end."""
    exact_match_rows: Every = 0
    """Held-out rows that the model answers before and after training, compared letter by letter; 0: none."""
    answer_tokens: Count = 128
    """Longest such answer in tokens."""


@dataclass(frozen=True, kw_only=True)
class Memory(Table):
    """What is kept in memory and what is computed again."""

    checkpointing: Literal["block", "none"] = "block"
    """"block": keep only each block's input and compute the block again in the backward pass; "none": keep everything."""
    loss_chunk: Count = 512
    """Tokens whose logits exist at the same time in the loss."""


@dataclass(frozen=True, kw_only=True)
class Parallel(Table):
    """Where the run computes."""

    device: str = "auto"
    """"auto" (first CUDA card, else CPU), "cpu", "cuda" or "cuda:1"."""
    threads: Every = 0
    """CPU threads of torch's kernels; 0: as torch chooses. On CPU another number means other last bits."""


@dataclass(frozen=True, kw_only=True)
class Output(Table):
    """Where the run is written."""

    dir: str = ""
    """Run folder; empty: runs/ and the recipe file's name."""
    save_every: Every = 100
    """Steps between checkpoints; 0: only at the end."""
    keep: Count = 2
    """Newest checkpoints that are kept."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a run depends on."""

    base: Base
    method: Method
    optimizer: Optimizer
    schedule: Schedule
    data: Data
    train: Train
    memory: Memory
    parallel: Parallel
    output: Output

    def problems(self) -> list[str]:
        """Return what no single key shows: contradictions between keys, each with the fix."""
        train, data = self.train, self.data
        found = []
        if train.steps and train.epochs:
            found.append(f"train.steps = {train.steps} and train.epochs = {train.epochs} say the same thing twice; remove one")
        if not train.steps and not train.epochs:
            found.append("train.steps: neither steps nor epochs is given; say how long to train, for example train.epochs = 3")
        has_test = bool(data.test or data.held_out_rows)
        if data.test and data.held_out_rows:
            found.append(f'data.held_out_rows = {data.held_out_rows}: data.test = "{data.test}" is the held-out part already; remove one')
        for key in ("exact_match_rows", "eval_every"):
            if getattr(train, key) and not has_test:
                found.append(f"train.{key} = {getattr(train, key)}: there are no held-out rows; give data.test or data.held_out_rows")
        if train.steps and self.schedule.warmup_steps >= train.steps:
            found.append(f"schedule.warmup_steps = {self.schedule.warmup_steps}: not less than train.steps = {train.steps}; lower it")
        default = Base(model="")
        changed = [k for k in ("quant_type", "double_quant", "block_size") if getattr(self.base, k) != getattr(default, k)]
        if self.base.bits != 4 and changed:
            found.append(
                f"base.{changed[0]} = {getattr(self.base, changed[0])!r}: only a 4-bit base has it, and base.bits = {self.base.bits}; remove it"
            )
        return found

    def with_absolute_paths(self) -> "Recipe":
        """Return the same recipe with local paths made absolute, so that it means the same from every folder."""
        data = {key: _absolute(value) for key in ("train", "test") if (value := getattr(self.data, key))}
        base = dataclasses.replace(self.base, model=_absolute(self.base.model))
        return dataclasses.replace(self, base=base, data=dataclasses.replace(self.data, **data))


TABLES: dict[str, type[Table]] = {
    "base": Base,
    "method": Method,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "data": Data,
    "train": Train,
    "memory": Memory,
    "parallel": Parallel,
    "output": Output,
}


def table_class(table: str, values: dict) -> type[Table]:
    """Return the class that reads ``table``: one of several where the table's ``name`` chooses it."""
    if table == "method":
        return METHODS[values.get("name", "lora")]
    return TABLES[table]


def _absolute(value: str) -> str:
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value
