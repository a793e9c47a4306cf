"""What a run will take of memory, found by running its own code on tensors that have shapes and lives but no bytes.

The base is filled, the method attached, the optimizer built, and the largest micro-batch trained, stepped, evaluated and
answered for, all under fake tensors (torch's FakeTensorMode) on the CPU, with the ledger of a real run following every
storage. Nothing is computed and no weight is read.

A decoder's blocks are alike, so a few of them say what all will take: at every place of a run the bytes of each term are a
straight line in the number of blocks. Two short models are traced and the line is drawn on; a model whose blocks are not alike
(mixed ranks, a pattern that does not repeat) is traced whole.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedConfig

from qlite.data.batches import Batch
from qlite.data.encode import Encoded
from qlite.errors import ModelError
from qlite.memory import terms
from qlite.memory.kernels import WholeKernels
from qlite.memory.ledger import Ledger, Moment, Peak, name_of_block
from qlite.memory.work import Work
from qlite.methods.base import saved_tensors
from qlite.model.blocks import decoder_blocks
from qlite.model.documents import documents_told
from qlite.model.load import fill
from qlite.model.lowering import lower_memory
from qlite.model.shapes import BaseShapes
from qlite.offload import window
from qlite.optim.build import FlatOptimizer
from qlite.quant.linear import Linear8bit, Storage
from qlite.recipe.schema import Recipe
from qlite.serving.answer import TOKENS_AT_ONCE
from qlite.serving.decoding import largest_passes
from qlite.training.step import Stepper

LOAD, ATTACH, STEP, OPTIMIZER_STEP, EVALUATION, ANSWERS = "load", "attach", "training", "optimizer", "evaluation", "answers"
FIRST_OTHERS = 3
"""Blocks at the bottom that may be others than all above: LLaMA-Adapter leaves the first two as they are."""
PHASES = (LOAD, ATTACH, STEP, OPTIMIZER_STEP, EVALUATION, ANSWERS)
"""The stretches of a run whose peaks are told apart."""


@dataclass(frozen=True)
class Workload:
    """The largest pieces of work of a run: what decides its peak."""

    train: Batch
    held_out: Batch | None = None
    answers: tuple[int, int, int] | None = None
    """Prompts decoded together, their width in tokens, and the most new tokens of each."""


@dataclass(frozen=True)
class Forecast:
    """What a trace has found: the peak at every place of a run, and the work of one micro-batch's forward and backward pass."""

    moments: dict[Moment, Peak]
    work: Work
    int8_bytes: int = 0
    """What a card's products on int8 codes hold beyond what was traced: on a CPU, the weight is dequantised instead."""

    def peaks(self) -> dict[str, Peak]:
        """Return the largest peak of each phase."""
        return largest(self.moments)

    def as_record(self) -> dict:
        """Return all of it in JSON's types."""
        moments = [[*moment, vars(peak)] for moment, peak in self.moments.items()]
        return {"moments": moments, "work": self.work.as_record(), "int8_bytes": self.int8_bytes}

    @classmethod
    def of_record(cls, record: dict) -> "Forecast":
        """Return the forecast that ``as_record`` has written."""
        moments = {(stretch, where): Peak(**peak) for stretch, where, peak in record["moments"]}
        return cls(moments, Work.of_record(record["work"]), int(record["int8_bytes"]))


def largest(moments: dict[Moment, Peak]) -> dict[str, Peak]:
    """Return the largest peak of each phase of ``moments``, in the order of ``PHASES``."""
    found: dict[str, Peak] = {}
    for (stretch, _), peak in moments.items():
        phase = stretch.partition(",")[0]
        if phase in PHASES and (phase not in found or peak.bytes > found[phase].bytes):
            found[phase] = peak
    return {phase: found[phase] for phase in PHASES if phase in found}


def worst_workload(recipe: Recipe) -> Workload:
    """Return the largest work that ``recipe`` allows, whatever its data: every row as long as train.tokens, every token trained."""
    plan = recipe.train
    row = one_row(plan.tokens)
    # Two documents a line: with more of them attention only needs less.
    halves = [one_row(length) for length in (plan.tokens // 2, plan.tokens - plan.tokens // 2)]
    train = Batch.packed([halves] * plan.micro_batch, 0) if plan.packing else Batch.of([row] * plan.micro_batch, 0)
    has_held_out = bool(recipe.data.test or recipe.data.held_out_rows)
    held_out = Batch.of([row] * plan.micro_batch, 0) if has_held_out else None
    return Workload(train, held_out, answers_work(recipe, plan.tokens))


def answers_work(recipe: Recipe, prompt: int) -> tuple[int, int, int] | None:
    """Return the largest group of prompts of up to ``prompt`` tokens that ``recipe`` lets the model answer, or None."""
    plan = recipe.train
    asked = max(plan.exact_match_rows, len(plan.samples))
    return (max(1, min(asked, TOKENS_AT_ONCE // (prompt + plan.answer_tokens))), prompt, plan.answer_tokens) if asked else None


def forecast(recipe: Recipe, shapes: BaseShapes, work: Workload) -> Forecast:
    """Return what a run of ``recipe`` on a base of ``shapes`` takes for ``work``, as tensor bytes on its device.

    Raises:
        ModelError, RecipeError: base, targets, ranks and memory keys do not fit each other.
    """
    _fill_code_tables()
    for batch in (work.train, work.held_out):
        assert batch is None or len(batch.targets)  # counted now: on fake tensors nothing can be counted
    recipe = _traceable(recipe)
    model = recipe.base.empty(shapes.config, torch.device("cpu"))
    model.requires_grad_(False)
    recipe.method.attach(model)
    lengths = _short_lengths(list(decoder_blocks(model).values()), shapes.config)
    if lengths is None:
        return replace(trace(recipe, shapes, work), int8_bytes=_int8_bytes(model, work.train.size))
    short, long, whole = lengths
    a, b = (trace(recipe, replace(shapes, config=_cut(shapes.config, count)), work) for count in (short, long))
    factor = (whole - short) / (long - short)
    moments = {moment: _drawn_on(a.moments[moment], b.moments[moment], factor) for moment in b.moments if moment in a.moments}
    counted = a.work.drawn_on(b.work, factor)
    return Forecast(_with_whole_optimizer(recipe, model, moments), counted, _int8_bytes(model, work.train.size))


@torch.enable_grad()
def trace(recipe: Recipe, shapes: BaseShapes, work: Workload) -> Forecast:
    """Return what ``forecast`` returns, from a trace of every block."""
    recipe, where = _traceable(recipe), torch.device("cpu")
    model = recipe.base.empty(shapes.config, where)
    ledger, counter, blocks = Ledger(), Work(), decoder_blocks(model)

    def read(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ledger.reading(_part_of_model(name, list(blocks)))
        return window(lambda: torch.empty(shape, dtype=dtype))

    with FakeTensorMode(allow_non_fake_inputs=True), WholeKernels(), ledger:
        with ledger.phase(LOAD, terms.BASE):
            fill(model, shapes.checkpoint(model, read), where, lambda *_: None, recipe.memory)
        model.requires_grad_(False).eval()
        ledger.adopt_model(model)
        with ledger.phase(ATTACH, terms.ADAPTER):
            recipe.method.attach(model)
            ledger.adopt_model(model)
        lower_memory(model, recipe.memory, where)
        optimizer = recipe.optimizer.build(recipe.method.param_groups(model, recipe.optimizer.lr), where, lambda _: None)
        adopt_all(ledger, model, optimizer)
        stepper = Stepper(model, recipe.method, recipe.memory.loss_chunk, where)
        with ledger.following(model, list(blocks.values())):
            with ledger.phase(STEP), counter, documents_told(work.train.position_ids is not None):
                stepper.accumulate([work.train])
            with ledger.phase(OPTIMIZER_STEP, terms.OPTIMIZER):
                optimizer.clip(recipe.train.clip_norm)
                optimizer.step()
            if work.held_out is not None:
                with ledger.phase(EVALUATION), torch.no_grad(), documents_told(False):
                    model.eval()
                    stepper.loss(work.held_out, 1)
            if work.answers is not None:
                # Each pass apart: only then is either a straight line in the number of blocks.
                for name, answer in largest_passes(model, *work.answers, where):
                    with ledger.phase(f"{ANSWERS}, {name}", terms.CACHE, terms.CACHE):
                        answer()
    return Forecast(dict(ledger.moments), counter)


def _traceable(recipe: Recipe) -> Recipe:
    """Return ``recipe`` with an attention that needs no card: flash and flex keep what torch's own flash attention keeps; and with any ids.

    Raises:
        ModelError: they are to be kept over checkpointing, which only "auto" can.
    """
    recipe = replace(recipe, method=recipe.method.resolved(None))
    if recipe.base.attention not in ("flash", "flex"):
        return recipe
    if recipe.memory.checkpointing == "attention":
        raise ModelError(
            f'memory.checkpointing = "attention": it is known for base.attention = "auto" alone, not for "{recipe.base.attention}"; '
            "set one of them to another"
        )
    return replace(recipe, base=replace(recipe.base, attention="auto"))


def adopt_all(ledger: Ledger, model: nn.Module, optimizer: FlatOptimizer) -> None:
    """Put all that lasts in a run under its terms."""
    ledger.adopt_model(model)
    ledger.adopt([flat.grad for flat in optimizer.flats], terms.GRADIENTS)
    ledger.adopt(optimizer.state()[0].values(), terms.OPTIMIZER)


def _with_whole_optimizer(recipe: Recipe, model: nn.Module, moments: dict[Moment, Peak]) -> dict[Moment, Peak]:
    """Return ``moments`` with the optimizer over all that is trained in ``model``, on the meta device.

    It is no line: it takes the weights in parts of a fixed size, and keeps the state of small tensors in another form.
    """
    ledger = Ledger()
    with FakeTensorMode(allow_non_fake_inputs=True), ledger, ledger.phase(OPTIMIZER_STEP, terms.OPTIMIZER):
        saved = saved_tensors(model, resumable=True).values()
        empty = {t: torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in saved}
        empty = {t: nn.Parameter(own) if t.requires_grad else own for t, own in empty.items()}
        for module in model.modules():  # a tensor that two modules share stays one
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor in empty:
                    setattr(module, name, empty[tensor])
        optimizer = recipe.optimizer.build(recipe.method.param_groups(model, recipe.optimizer.lr), torch.device("cpu"), lambda _: None)
        ledger.adopt(saved_tensors(model, resumable=True).values(), terms.ADAPTER)
        ledger.adopt([flat.grad for flat in optimizer.flats], terms.GRADIENTS)
        lasting = {terms.OPTIMIZER: ledger.now[terms.OPTIMIZER]}
        ledger.moments.clear()
        optimizer.clip(recipe.train.clip_norm)
        optimizer.step()
    stepping = ledger.moments[OPTIMIZER_STEP, ""].terms
    own = {OPTIMIZER_STEP: stepping, **dict.fromkeys((STEP, EVALUATION, ANSWERS), lasting)}
    return {
        (stretch, where): replace(peak, terms=peak.terms | own.get(stretch.partition(",")[0], {}))
        for (stretch, where), peak in moments.items()
    }


def _drawn_on(short: Peak, long: Peak, factor: float) -> Peak:
    """Return what ``short`` becomes when it grows by ``factor`` times its difference to ``long``."""
    names = dict.fromkeys([*short.terms, *long.terms])
    grown = {name: _line(short.terms.get(name, 0), long.terms.get(name, 0), factor) for name in names}
    return Peak(grown, long.where, _line(short.host, long.host, factor))


def _line(short: int, long: int, factor: float) -> int:
    return round(short + (long - short) * factor)


# Which blocks are alike


def _short_lengths(blocks: list[nn.Module], config: PreTrainedConfig) -> tuple[int, int, int] | None:
    """Return two numbers of blocks that say what all do, and that of all; None where the model must be traced whole."""
    kinds, count = [_kind(block) for block in blocks], len(blocks)
    if getattr(config, "num_hidden_layers", None) != count:
        return None
    for first in range(FIRST_OTHERS + 1):
        for period in range(1, 9):
            # Those below the pattern, the first and last of it and, in between, at least one whole period.
            short = first + (count - first) % period + period * -(-(period + 2) // period)
            if short + period < count and all(kinds[i] == kinds[i + period] for i in range(first, count - period)):
                return short, short + period, count
    return None


def _kind(block: nn.Module) -> tuple:
    """Return what decides a block's memory: its modules' classes and its tensors' shapes and dtypes, and which attention it has."""
    modules = [(name, type(module)) for name, module in block.named_modules()]
    tensors = [(name, t.shape, t.dtype, t.requires_grad) for name, t in [*block.named_parameters(), *block.named_buffers()]]
    settings = [(name, getattr(module, name, None)) for _, module in block.named_modules() for name in ("is_sliding", "sliding_window")]
    return (*modules, *tensors, *settings, getattr(block, "attention_type", None))


def _cut(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """Return ``config`` with its first ``count`` blocks only."""
    cut = copy.deepcopy(config)
    if getattr(cut, "layer_types", None):
        cut.layer_types = cut.layer_types[:count]
    cut.num_hidden_layers = count
    return cut


def one_row(tokens: int) -> Encoded:
    """Return a row of ``tokens`` tokens, all of them trained."""
    return Encoded([0] * tokens, [True] * tokens)


def _part_of_model(name: str, blocks: list[str]) -> str:
    """Return the block that the tensor ``name`` belongs to, in words, or its own name."""
    number = next((number for number, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
    return name if number is None else name_of_block(number, len(blocks))


def _int8_bytes(model: nn.Module, tokens: int) -> int:
    """Return the most that a product of ``tokens`` rows by int8 codes holds beyond one by the dequantised weight.

    x in float16, its codes and the int32 product (bitsandbytes 0.50, int8_mixed_scaled_mm) instead of the weight in the compute dtype.
    """
    linears = [module for module in model.modules() if isinstance(module, Linear8bit) and module.storage.int8_product]
    return max([tokens * (3 * a.in_features + 4 * a.out_features) - 2 * a.in_features * a.out_features for a in linears], default=0)


def _fill_code_tables() -> None:
    """Let bitsandbytes compute its code tables, which it keeps, from real numbers: a trace has none."""
    Storage(4).make(64, 64, False, torch.float32, "cpu").store(torch.zeros(64, 64))
