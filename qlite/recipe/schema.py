"""The recipe: nine tables, each a frozen dataclass. ``python -m qlite.train --keys`` prints what stands under the fields."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from qlite.data.batches import TokenBatches
from qlite.data.dataset import Data, DataSet
from qlite.data.formats import FIELDS, ROLE_NAMES
from qlite.data.sources import FILE_SUFFIXES, Source, is_hub
from qlite.data.template import SUFFIXES, TEMPLATES, is_template_name
from qlite.methods import METHODS, Combined, Method
from qlite.model.load import Base
from qlite.optim.build import Optimizer
from qlite.optim.schedule import Schedule
from qlite.table import Table

# Files whose rows have fields of their own.
ROW_SUFFIXES = tuple(suffix for suffix in FILE_SUFFIXES if suffix not in (".txt", ".md"))
Count = Annotated[int, Field(ge=1)]
Every = Annotated[int, Field(ge=0)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$", json_schema_extra={"words": '"auto", "cpu", "cuda" or "cuda:1"'})]
WHOLE = ("none", "elementwise")
"""Values of memory.checkpointing with which no block is computed again."""
BYTES = r"(?i)^\s*\d+(\.\d+)?\s*[kmgt]i?b?\s*$"
# More threads than any machine has cores: torch ends the process where it cannot start them.
Threads = Annotated[int, Field(ge=0, le=1024)]


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
    """Longest row in tokens; what happens to longer ones is data.long_rows, and the run says how many there are."""
    packing: bool = False
    """Fill lines of train.tokens with as many rows as fit, which do not see each other; micro_batch then counts lines."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest L2 norm of a step's gradient; 0: no clipping."""
    max_skipped: Every = 3
    """Steps in a row that may be skipped because their loss or gradient is no number; one more, and the run ends with exit code 4."""
    spike_factor: Annotated[float, Field(ge=0)] = 0.0
    """Skip a step, too, whose loss is more than so many times the median of the last 50; 0: whatever it is."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the adapter's start, the order of rows and dropout."""
    eval_every: Every = 0
    """Steps between evaluations on the held-out rows; 0: only at the end."""
    patience: Every = 0
    """Evaluations in a row without a lower held-out loss after which the run stops; 0: it never stops early."""
    exact_match_rows: Every = 0
    """Held-out rows that the model answers before and after training, compared letter by letter; 0: none."""
    answer_tokens: Count = 128
    """Longest such answer in tokens."""
    samples: tuple[str, ...] = ()
    """Prompts that the model answers at every evaluation, to be read."""

    def batches(self, data: DataSet) -> TokenBatches:
        """Return the training rows of ``data`` as the batches of a run."""
        pack_tokens = self.tokens if self.packing else None
        return TokenBatches(data.train, self.micro_batch, self.accumulation, self.seed, data.encoder.pad_id, pack_tokens)


@dataclass(frozen=True, kw_only=True)
class Memory(Table):
    """What is kept in memory and what is computed again."""

    plan: Literal["require", "tell", "off"] = "require"
    """What is done with the plan that is traced before the weights are read: "require": a run that does not fit is not begun; "tell": it is
    only told; "off": none is made."""
    budget: Annotated[str, Field(pattern=BYTES, json_schema_extra={"words": 'an amount like "8GiB"'})] | None = None
    """Memory that the run may take of the card, "8GiB": micro-batch and the keys below are then chosen, the fastest that fit."""
    checkpointing: Literal["auto", "none", "elementwise", "attention", "block"] = "auto"
    """"none": keep everything for the backward pass; "elementwise": compute what norms and gated MLPs give LoRA's linears again;
    "attention": keep each block's input and what its attention gave, and compute the rest again; "block": keep the input alone; "auto": by
    the run's plan, the first of these that leaves a tenth of the memory free, and "block" where none is made."""
    loss_chunk: Count = 128
    """Tokens whose logits exist at the same time in the loss."""
    saved_inputs: Literal["device", "host", "8bit"] = "device"
    """Where the blocks' inputs lie until the backward pass: on the device, in host memory, or on the device in 8 bit."""
    mlp_chunk: Every = 0
    """Tokens that go through a block's MLP at a time, for long lines; 0: all at once."""
    embedding: Literal["device", "host"] = "device"
    """"host": the token embedding stays in host memory, and only the rows that are looked up go to the device."""
    base: Literal["device", "host"] = "device"
    """"host": the blocks' weights stay in host memory, and at most two blocks' are on the device: for models larger than the card."""


@dataclass(frozen=True, kw_only=True)
class Parallel(Table):
    """Where the run computes."""

    device: Device = "auto"
    """"auto": the first CUDA card, else the CPU."""
    threads: Threads = 0
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
    on_full_disk: Literal["stop", "continue"] = "stop"
    """What is done where a disk takes no checkpoint: "stop" with exit code 3, or "continue" and try again at the next."""
    adapter: Literal["last", "best"] = "last"
    """The adapter that the run ends with: that of the last step, or that of the lowest held-out loss."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Tools that get the run's figures, texts and recipe, beside the files that a run always writes; each is an extra of qlite's:
    pip install -e '.[tensorboard]'. To look at: tensorboard --logdir runs. WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI and the other
    variables of these tools hold."""


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

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], changes: Mapping[str, object] | None = None) -> "Recipe":
        """Return the recipe in the TOML file ``path``, with ``changes`` by full key name over it: {"train.steps": 20}.

        Paths in it are relative to the working directory, as on the command line; the run goes to runs/ and the file's name.

        Raises:
            RecipeError: with every problem: key, value seen, fix.
        """
        from qlite.recipe.read import read_recipe  # here: what reads recipes is built on this file

        return read_recipe(Path(path), changes=changes or {})

    @classmethod
    def from_tables(cls, tables: Mapping[str, object], changes: Mapping[str, object] | None = None) -> "Recipe":
        """Return the recipe of nested ``tables`` as TOML would give them, {"base": {"model": ...}, "train": {"steps": 20}}.

        A table may be the object that it makes, too: {"train": Train(steps=20)}. A value None is as if the key were not there.
        ``changes`` are those of ``from_file``. To be trained it needs output.dir: there is no file to name the run after.

        Raises:
            RecipeError: with every problem: key, value seen, fix.
        """
        from qlite.recipe.read import recipe_of_tables

        return recipe_of_tables(tables, changes or {})

    @property
    def name(self) -> str:
        """What a run of it is called: the last part of output.dir."""
        return Path(self.output.dir).name or "recipe"

    def problems(self) -> list[str]:
        """Return what no single key shows: contradictions between keys, each with the keys' full names and the fix."""
        found = [*self._path_problems(), *self._training_problems(), *self._data_problems(), *self._memory_problems()]
        return [*found, *self._trained_base_problems(), *self._unused_keys()]

    def _path_problems(self) -> Iterator[str]:
        """Yield the paths that no file can have, or no recipe can hold."""
        paths = {"base.model": self.base.model, "data.template": self.data.template, "output.dir": self.output.dir}
        for part in ("train", "test"):
            given = getattr(self.data, part) or ()
            single = {f"data.{part}": given} if isinstance(given, str) else {}
            paths |= single or {f"data.{part}[{i}].path": source.path for i, source in enumerate(given, start=1)}
        for key, value in paths.items():
            if "\0" in value:
                yield f"{key} = {json.dumps(value)}: no file's name holds a NUL byte; write the path anew"
            if not is_utf8(value):
                yield f"{key} = {json.dumps(value)}: holds bytes that are not UTF-8, and no recipe can; give {key} another name"

    def _training_problems(self) -> Iterator[str]:
        train, warmup = self.train, self.schedule.warmup_steps
        if train.steps and train.epochs:
            yield f"train.steps = {train.steps} and train.epochs = {train.epochs} both say how long to train; remove one"
        if not train.steps and not train.epochs:
            yield "train.steps and train.epochs: neither is given; say how long to train, for example train.epochs = 3"
        if train.steps and warmup >= train.steps:
            yield f"schedule.warmup_steps = {warmup}: not less than train.steps = {train.steps}; lower it"
        for key, part in self._methods():
            if getattr(part, "targets", None) == ():
                yield f'{key}.targets = []: names no layer, so nothing would be trained; remove it or write "all-linear"'
        if not self.base.model:
            yield 'base.model = "": is empty; give a folder, a .gguf file or a hub id like "Qwen/Qwen2.5-0.5B-Instruct"'

    def _methods(self) -> Iterator[tuple[str, Method]]:
        """Yield the table's full name and what it made, for each method there is."""
        if isinstance(self.method, Combined):
            yield from ((f"method.{part.name}", part) for part in self.method.parts)
        else:
            yield "method", self.method

    def _trained_base_problems(self) -> Iterator[str]:
        """Yield what cannot be where the base's own weights are trained."""
        name = next((part.name for part in self.method.each if part.trains_base), None)
        if name is None:
            return
        if len(self.method.each) > 1:
            others = ", ".join(f'"{part.name}"' for part in self.method.each if part.name != name)
            yield f'method.name: "{name}" trains every weight, so beside it there is nothing left for {others}; leave it or them out'
        for key in ("bits", "embedding_bits", "head_bits"):
            if (bits := getattr(self.base, key)) < 16:
                yield f'base.{key} = {bits}: method.name = "{name}" trains the weights themselves, and codes have no gradient; set it to 16'
        for key in ("base", "embedding"):
            if getattr(self.memory, key) == "host":
                yield f'memory.{key} = "host": method.name = "{name}" trains it, and what is trained lies on the device; set it to "device"'

    def _data_problems(self) -> Iterator[str]:
        train, data = self.train, self.data
        if not data.train:
            empty = json.dumps(data.train)  # a text or a list
            yield f'data.train = {empty}: is empty; give a file, a folder, or a hub data set "org/name"'
        if data.test and data.held_out_rows:
            yield f"data.held_out_rows = {data.held_out_rows}: data.test is the held-out part already; remove one"
        wanted = {f"train.{key}": getattr(train, key) for key in ("exact_match_rows", "eval_every", "patience")}
        wanted["output.adapter"] = self.output.adapter if self.output.adapter != "last" else None
        for key, value in wanted.items():
            if value and not (data.test or data.held_out_rows):
                yield f"{key} = {json.dumps(value)}: there are no held-out rows; give data.test or data.held_out_rows"
        if not is_template_name(data.template):
            yield f'data.template = "{data.template}": should be "auto", {", ".join(json.dumps(n) for n in TEMPLATES)} or a .jinja file'
        if data.stride and data.stride > train.tokens:
            yield f"data.stride = {data.stride}: is more than train.tokens = {train.tokens}: text between windows would be lost; lower it"
        yield from self._mapping_problems()

    def _memory_problems(self) -> Iterator[str]:
        memory = self.memory
        if memory.checkpointing == "elementwise" and not self.base.fused:
            yield 'memory.checkpointing = "elementwise": only fused norms and MLPs are made again, and base.fused = false; set that to true'
        for key, what in (("saved_inputs", "keep only their inputs"), ("base", "need their weights one at a time")):
            value = getattr(memory, key)
            if value != "device" and memory.checkpointing in WHOLE:
                kept = f'memory.checkpointing = "{memory.checkpointing}"'
                yield f'memory.{key} = "{value}": only checkpointed blocks {what}, and {kept}; set that to "block"'

    def _mapping_problems(self) -> Iterator[str]:
        """Yield the names in column and role mappings that are none of ours."""
        tables = {"data": self.data}
        for part in ("train", "test"):
            given = getattr(self.data, part)
            tables |= {f"data.{part}[{i}]": source for i, source in enumerate(given, start=1)} if isinstance(given, tuple) else {}
        for name, table in tables.items():
            for key, known in (("columns", FIELDS), ("roles", ROLE_NAMES)):
                for wrong in (table_values := getattr(table, key) or {}).keys() - set(known):
                    other = table_values[wrong]
                    turned = f'; turn it round: {{ {other} = "{wrong}" }}' if other in known else f"; there are: {', '.join(known)}"
                    yield f'{name}.{key}.{wrong} = "{other}": no field of ours is called so{turned}'

    def _unused_keys(self) -> Iterator[str]:
        """Yield the keys that were set and could do nothing, because another key leaves them no part."""
        base, plain = self.base, Base(model="")
        changed = [key for key in ("quant_type", "double_quant", "block_size") if getattr(base, key) != getattr(plain, key)]
        if 4 not in (base.bits, base.embedding_bits, base.head_bits) and changed:
            key, value = changed[0], json.dumps(getattr(base, changed[0]))
            yield f"base.{key} = {value}: only a 4-bit base has it, and base.bits = {base.bits}; remove it"
        if self.schedule.name == "constant" and self.schedule.final_ratio:
            yield f'schedule.final_ratio = {self.schedule.final_ratio}: schedule.name = "constant" never decays; remove one'
        if self.optimizer.name == "lion8bit" and self.optimizer.eps != Optimizer().eps:
            yield f'optimizer.eps = {self.optimizer.eps}: optimizer.name = "lion8bit" has no such term; remove it'
        yield from self._unused_source_keys()
        has_held_out = bool(self.data.test or self.data.held_out_rows)
        for key, value in (("output.adapter", self.output.adapter == "best"), ("train.patience", self.train.patience)):
            if value and has_held_out and not self.train.eval_every:
                yield f"{key}: there is one evaluation, at the end, so this can do nothing; give train.eval_every"

    def _unused_source_keys(self) -> Iterator[str]:
        """Yield what is said of sources that cannot have it."""
        data = self.data
        given = [value for value in (data.train, data.test) if value]
        sources = [source for value in given for source in ([Source(path=value)] if isinstance(value, str) else value)]
        hubs = [source for source in sources if is_hub(source.path)]
        for key in ("split", "revision"):
            if getattr(data, key) not in ("train", None) and sources and not hubs:
                yield f'data.{key} = "{getattr(data, key)}": only a hub data set has one, and data.train = "{sources[0].path}"; remove it'
        lines = [source for source in sources if source not in hubs and not source.path.endswith(ROW_SUFFIXES)]
        if data.separator is not None and sources and not lines:
            yield f'data.separator = "{data.separator}": only .txt files are cut at one, and data.train = "{sources[0].path}"; remove it'
        for part in ("train", "test"):
            tables = getattr(data, part)
            for number, source in enumerate(tables if isinstance(tables, tuple) else (), start=1):
                for key in ("name", "split", "revision", "stream"):
                    if getattr(source, key) not in (None, False) and source not in hubs:
                        yield f'data.{part}[{number}].{key}: only a hub data set has one, and its path is "{source.path}"; remove it'

    def having(self, keys: dict[str, object]) -> "Recipe":
        """Return the same recipe with other values: ``keys`` by full name, {"memory.loss_chunk": 256}."""
        recipe = self
        for name, value in keys.items():
            table, _, key = name.partition(".")
            old = getattr(recipe, table)
            new = old.having(key, value) if isinstance(old, Method) else dataclasses.replace(old, **{key: value})
            recipe = dataclasses.replace(recipe, **{table: new})
        return recipe

    def get(self, name: str) -> object:
        """Return the value of the key with the full ``name``."""
        table, _, key = name.partition(".")
        found = getattr(self, table)
        return found.get(key) if isinstance(found, Method) else getattr(found, key)

    def with_absolute_paths(self) -> "Recipe":
        """Return the same recipe with local paths made absolute, so that it means the same from every folder."""
        data = {key: _absolute_sources(value) for key in ("train", "test") if (value := getattr(self.data, key))}
        if self.data.template.endswith(SUFFIXES):
            data["template"] = _absolute(self.data.template)
        base = dataclasses.replace(self.base, model=_absolute(self.base.model))
        output = dataclasses.replace(self.output, dir=_expanded(self.output.dir))
        return dataclasses.replace(self, base=base, data=dataclasses.replace(self.data, **data), output=output)


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


def tables_with(name: str) -> list[str]:
    """Return the tables that have a key ``name``."""
    return [table for table in TABLES if name in {field.name for field in dataclasses.fields(table_class(table, {}))}]


def is_utf8(text: str) -> bool:
    """Return whether ``text`` can be written: one from the command line may hold halves of characters, for bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _absolute_sources(given: str | tuple[Source, ...]) -> str | tuple[Source, ...]:
    if isinstance(given, str):
        return _absolute(given)
    return tuple(dataclasses.replace(source, path=_absolute(source.path)) for source in given)


def _absolute(value: str) -> str:
    try:
        path = Path(value).expanduser()
        is_pattern = bool(set(value) & set("*?["))
        return os.path.normpath(path.absolute()) if is_pattern or path.exists() else value
    except (RuntimeError, OSError):  # "~name" of no user of this machine; a name longer than the disk allows
        return value


def _expanded(value: str) -> str:
    """Return ``value`` with a leading ~ written out."""
    try:
        return str(Path(value).expanduser())
    except RuntimeError:
        return value
