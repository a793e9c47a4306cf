"""Running out of memory is survived with the same gradient, said to the user, and remembered; nothing else is taken for it."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlite import device
from qlite.data.batches import Batch
from qlite.data.encode import Encoded
from qlite.errors import MachineError, OutOfMemory
from qlite.hashes import sha256
from qlite.methods import METHODS, Combined
from qlite.methods.base import trainable_tensors
from qlite.methods.lora import LoRA
from qlite.optim.build import FlatOptimizer, Optimizer
from qlite.training import parts
from qlite.training.limits import Limits
from qlite.training.run_folder import RunFolder
from qlite.training.step import Stepper, StepResult
from tests.tiny import random_rows, tiny_llama
from tests.tiny_run import ANSWERS, Watcher, run, tiny_recipe

CPU = torch.device("cpu")
PAD = 0
# float32, one mask for all (none), and an optimizer that does not blow up what is next to nothing.
EXACT = {
    "base": {"dtype": "float32"},
    "method": {"dropout": 0.0},
    "optimizer": {"name": "torch_adamw", "lr": 1e-2, "eps": 1e-4},
}
PLAIN = {"train": {"steps": 4, "micro_batch": 4, "accumulation": 2, "eval_every": 0, "exact_match_rows": 0}}
PACKED = {"train": {**PLAIN["train"], "packing": True, "tokens": 96, "micro_batch": 2}}


def full() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Accident:
    """Memory that runs out at one place of one step, once: in the second micro-batch, when gradients of the first are summed already."""

    def __init__(self, place: str = "", step: int = 0, error: Exception | None = None):
        self.place, self.at_step, self.error = place, step, error or full()
        self.step, self.micro_batch, self.happened = 0, 0, 0
        self.seen: list[list[tuple[int, ...]]] = []
        """The documents that the model read in each step, those of a try that failed left out."""
        self.lost: weakref.ref | None = None
        """The hidden states of a pass that failed."""
        self.was_freed: bool | None = None

    def put_into(self, monkeypatch: pytest.MonkeyPatch) -> "Accident":
        """Let the next run's stepper have this accident."""
        monkeypatch.setattr(parts, "Stepper", lambda model, *rest: self.watch(Stepper(model, *rest)))
        return self

    def watch(self, stepper: Stepper) -> Stepper:
        model = stepper.model.base_model
        model.register_forward_pre_hook(self._reads, with_kwargs=True)
        model.layers[0].input_layernorm.register_forward_hook(self._passes)
        take, accumulate = stepper.step, stepper.accumulate

        def step(batches: list[Batch], optimizer: FlatOptimizer, *rest, **options) -> StepResult:
            self.step += 1
            self.seen.append([])
            inner = optimizer.inner.step
            optimizer.inner.step = lambda: self._happen("optimizer") or inner()
            try:
                return take(batches, optimizer, *rest, **options)
            finally:
                optimizer.inner.step = inner

        def try_(batches: list[Batch]) -> torch.Tensor:
            self.micro_batch, self.seen[-1:] = 0, [[]]
            return accumulate(batches)

        stepper.step, stepper.accumulate = step, try_
        return stepper

    def _reads(self, model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if self.lost is not None and self.was_freed is None:
            self.was_freed = self.lost() is None
        if model.training and self.seen:
            self.micro_batch += 1
            self.seen[-1] += documents(kwargs["input_ids"], kwargs.get("position_ids"))

    def _passes(self, norm: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        if norm.training and self.micro_batch == 2:
            # Computed again in the backward pass (checkpointing): when the gradients of the layers above are there.
            is_backward = torch._C._current_graph_task_id() != -1
            self._happen("backward" if is_backward else "forward", output)

    def _happen(self, place: str, states: torch.Tensor | None = None) -> None:
        if place == self.place and self.step == self.at_step and not self.happened:
            self.happened += 1
            self.lost = None if states is None else weakref.ref(states)
            raise self.error


def documents(input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> list[tuple[int, ...]]:
    """Return the documents of a batch; padding is none, at a row's end or as a document of its own."""
    if position_ids is None:
        return [tuple(row[: max(i for i, token in enumerate(row) if token != PAD) + 1]) for row in input_ids.tolist()]
    found: list[list[int]] = []
    for token, position in zip(input_ids.flatten().tolist(), position_ids.flatten().tolist(), strict=True):
        if position == 0:
            found.append([])
        found[-1].append(token)
    return [tuple(document) for document in found if set(document) != {PAD}]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


def recipe_of(folder: Path, kind: dict, **more: dict):
    folder.mkdir(exist_ok=True)
    tables = {**EXACT, **kind}
    return tiny_recipe(folder, **{name: {**tables.get(name, {}), **more.get(name, {})} for name in {**tables, **more}})


@pytest.fixture(scope="module", params=[PLAIN, PACKED], ids=["padded", "packed"])
def untroubled(request, tmp_path_factory):
    """A run without an accident: (its kind, folder, what was seen, documents of each step)."""
    folder = tmp_path_factory.mktemp("untroubled")
    with pytest.MonkeyPatch.context() as monkeypatch:
        accident = Accident().put_into(monkeypatch)
        seen = run(recipe_of(folder, request.param))
    return request.param, folder, seen, accident.seen


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("place", ["forward", "backward", "optimizer"])
def test_a_run_that_ran_out_of_memory_once_is_the_run_that_did_not(untroubled, tmp_path, monkeypatch, place, step):
    kind, folder, expected, expected_documents = untroubled
    accident = Accident(place, step).put_into(monkeypatch)
    seen = run(recipe_of(tmp_path, kind))
    assert accident.happened == 1
    assert [report.oom_retries for report in seen.steps] == [int(report.step == step) for report in seen.steps]
    assert [report.loss for report in seen.steps] == pytest.approx([report.loss for report in expected.steps], rel=1e-6)
    mine, wanted = adapter(tmp_path), adapter(folder)
    assert mine.keys() == wanted.keys()
    assert max((mine[name] - wanted[name]).abs().max() for name in mine) < 1e-6
    # No row is lost, none is read twice.
    assert [(report.tokens, report.trained_tokens) for report in seen.steps] == [(r.tokens, r.trained_tokens) for r in expected.steps]
    assert [sorted(documents) for documents in accident.seen] == [sorted(documents) for documents in expected_documents]
    assert len(accident.seen) == 4
    (note,) = [note for note in seen.notes if "out of memory" in note]
    assert ("optimizer's step" in note) == (place == "optimizer")
    assert (f"{place} pass of a micro-batch of" in note) == (place != "optimizer")
    if place != "optimizer":
        assert accident.was_freed  # what the failed pass had computed, before the next one began
    saved = [int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    # What was learned of the machine is saved at once; two are kept: of 1, 2 and 4 the newest.
    assert step in saved or step == 1 or place == "optimizer"


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("memory", [{"saved_inputs": "host"}, {"base": "host"}], ids=["inputs", "base"])
def test_so_is_a_run_with_tensors_on_their_way_to_or_from_the_host(tmp_path, monkeypatch, memory, place):
    losses = []
    for name, accident in (("untroubled", Accident()), ("troubled", Accident(place, 2))):
        accident.put_into(monkeypatch)
        seen = run(recipe_of(tmp_path / name, PLAIN, memory=memory))
        losses.append([report.loss for report in seen.steps])
        assert sum(report.oom_retries for report in seen.steps) == accident.happened == (name == "troubled")
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    mine, wanted = adapter(tmp_path / "troubled"), adapter(tmp_path / "untroubled")
    assert max((mine[name] - wanted[name]).abs().max() for name in mine) < 1e-6


def test_the_record_of_every_step_says_how_often_memory_ran_out(tmp_path, monkeypatch):
    Accident("backward", 2).put_into(monkeypatch)
    run(recipe_of(tmp_path, PLAIN))
    assert [r["oom_retries"] for r in RunFolder(tmp_path / "run").records.read() if r["kind"] == "step"] == [0, 1, 0, 0]


@pytest.mark.slow
def test_gone_on_with_after_an_accident_a_run_keeps_its_bits(tmp_path, monkeypatch):
    def adapter_sum(name: str, accident: Accident, stop_after: int | None = None) -> str | Watcher:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        accident.put_into(monkeypatch)
        # Dropout draws other masks where rows are cut apart: only the same cuts give the same bytes.
        seen = run(tiny_recipe(folder, train={"eval_every": 2, "exact_match_rows": 0}, output={"save_every": 0}), stop_after)
        return seen if stop_after else sha256(folder / "run" / "adapter" / "adapter_model.safetensors")

    through = adapter_sum("through", Accident("backward", 2))
    adapter_sum("stopped", Accident("backward", 2), stop_after=3)
    assert [path.name for path in (tmp_path / "stopped" / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert adapter_sum("stopped", Accident()) == through
    assert adapter_sum("untroubled", Accident()) != through
    # Where in the step it happens is no matter: every try begins with the same seed.
    assert adapter_sum("earlier", Accident("forward", 2)) == through


@pytest.mark.parametrize("error", [ValueError("a shape"), RuntimeError("CUDA error: an illegal memory access was encountered")])
@pytest.mark.parametrize("place", ["forward", "backward", "optimizer"])
def test_no_other_error_is_swallowed(tmp_path, monkeypatch, place, error):
    accident = Accident(place, 1, error).put_into(monkeypatch)
    with pytest.raises(type(error), match=str(error)):
        run(recipe_of(tmp_path, PLAIN))
    assert accident.happened == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (full(), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("CUDA error: out of memory"), False),
        (KeyboardInterrupt(), False),
        (None, False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert device.is_out_of_memory(error) is expected


METHOD = LoRA(rank=4)


def stepper() -> tuple[Stepper, FlatOptimizer]:
    model = tiny_llama()
    METHOD.attach(model)
    for p in trainable_tensors(model).values():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    optimizer = Optimizer(name="torch_adamw", eps=1e-4).build(METHOD.param_groups(model, 1e-2), CPU)
    return Stepper(model, METHOD, 256, CPU), optimizer


def flat_weights(optimizer: FlatOptimizer) -> torch.Tensor:
    return torch.cat([flat.weight for flat in optimizer.flats]).clone()


def small_head(own: Stepper, most: int) -> list[int]:
    """Let the head of ``own`` hold the logits of ``most`` tokens; return the list of what it was asked for."""
    asked: list[int] = []

    def hook(module: torch.nn.Module, args: tuple) -> None:
        asked.append(args[0].shape[-2])
        if asked[-1] > most:
            raise full()

    own.head.register_forward_pre_hook(hook)
    return asked


def test_a_single_document_is_computed_with_fewer_logits_at_a_time():
    rows = random_rows(2, (300, 300))
    own, optimizer = stepper()
    free, reference = stepper()
    asked = small_head(own, 100)
    said: list[str] = []
    own.tell = said.append
    expected = free.step([Batch.of(rows, PAD)], reference, 1.0)
    # 2 rows with 300 trained tokens: 256 logits at a time, then one row's 150, then 75.
    result = own.step([Batch.of(rows, PAD)], optimizer, 1.0)
    assert result.oom_retries == 2
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert (flat_weights(optimizer) - flat_weights(reference)).abs().max() < 1e-6
    assert own.limits == Limits(loss_chunk=75, most_tokens=300)
    assert asked == [256, 150, 75, 75, 75, 75]
    assert said == [
        "out of memory in the forward pass of a micro-batch of 2 x 300 tokens, and 1 more after it: the step was made again, "
        "from now on with at most 300 tokens at once, the loss of 75 at a time"
    ]
    # What was too much is not tried again.
    assert own.step([Batch.of(rows, PAD)], optimizer, 1.0).oom_retries == 0


def test_a_document_that_cannot_be_made_smaller_ends_the_run_with_exit_code_3():
    own, optimizer = stepper()
    small_head(own, 63)
    before = flat_weights(optimizer)
    with pytest.raises(OutOfMemory, match=r"single document of 300 tokens.*64 tokens at a time") as caught:
        own.step([Batch.of(random_rows(3, (300, 300)), PAD)], optimizer, 1.0)
    assert (caught.value.exit_code, caught.value.rows, caught.value.tokens) == (3, 1, 300)
    assert "train.tokens" in str(caught.value)
    assert torch.equal(flat_weights(optimizer), before)
    own.advice = lambda rows, tokens, is_training: [f"{rows} x {tokens} fit on a larger card"] if is_training else []
    with pytest.raises(OutOfMemory, match=r"\n1 x 300 fit on a larger card"):
        own.step([Batch.of(random_rows(3, (300, 300)), PAD)], optimizer, 1.0)


def test_an_optimizer_that_never_fits_ends_the_run(tmp_path, monkeypatch):
    own, optimizer = stepper()

    def step() -> None:
        raise full()

    monkeypatch.setattr(optimizer.inner, "step", step)
    with pytest.raises(MachineError, match=r"optimizer's step.*optimizer.name"):
        own.step([Batch.of(random_rows(2), PAD)], optimizer, 1.0)


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        (LoRA(), ["method.rank"]),
        (METHODS["prefix"](), []),
        (METHODS["full"](), []),
        (Combined(parts=(LoRA(), METHODS["ia3"]())), ["method.lora.rank"]),
        (Combined(parts=(LoRA(), METHODS["low_rank"]())), ["method.lora.rank", "method.low_rank.rank"]),
    ],
)
def test_a_rank_is_named_where_the_method_has_one(method, keys, monkeypatch):
    lower = " or ".join(["train.tokens below 64", *keys])
    advised = Stepper(tiny_llama(), method, 256, CPU).advice(1, 64, True)
    assert advised == [f"Lower {lower}, see memory.* in --keys, or free memory that other programs hold"]
    own, optimizer = stepper()
    own.method = method

    def step() -> None:
        raise full()

    monkeypatch.setattr(optimizer.inner, "step", step)
    with pytest.raises(MachineError) as caught:
        own.step([Batch.of(random_rows(2), PAD)], optimizer, 1.0)
    assert str(caught.value).endswith('("paged_adamw8bit" needs least)' + "".join(f" or lower {key}" for key in keys))


def test_an_evaluation_that_runs_out_of_memory_measures_the_same_loss():
    own, _ = stepper()
    batches = [Batch.of(random_rows(5, (5, 40)), PAD), Batch.of(random_rows(2, (5, 40), seed=1), PAD)]
    expected = own.evaluate(batches)
    sizes: list[int] = []

    def hook(model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise full()

    own.model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    said: list[str] = []
    own.tell = said.append
    assert own.evaluate(batches) == pytest.approx(expected, rel=1e-6)
    assert sizes[:2] == [5, 3]
    assert max(sizes[2:]) <= 2
    assert len(said) == 1
    assert "evaluation of a micro-batch of 5 x" in said[0]
    # Training needs more anyway: what it may take is its own, and so are its bits.
    assert own.limits == Limits(256)


def test_answers_that_run_out_of_memory_are_the_same_answers(tmp_path, monkeypatch):
    def answers(name: str, most: int) -> Watcher:
        def watched(model, *rest) -> Stepper:
            def hook(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
                if not model.training and kwargs.get("use_cache") and len(kwargs["input_ids"]) > most:
                    raise full()

            model.register_forward_pre_hook(hook, with_kwargs=True)
            return Stepper(model, *rest)

        monkeypatch.setattr(parts, "Stepper", watched)
        return run(recipe_of(tmp_path / name, PLAIN, train={**PLAIN["train"], **ANSWERS}))

    free, small = answers("free", 99), answers("small", 1)
    assert small.answers == free.answers
    notes = [note for note in small.notes if "out of memory in answering 3 prompts together" in note]
    assert len(notes) == 2  # before the first step and after the last
    assert not any("out of memory" in note for note in free.notes)
    with pytest.raises(OutOfMemory, match=r"single prompt of \d+ tokens with up to 4 more.*train.answer_tokens"):
        answers("none", 0)


def padded_and_packed(rows: list[Encoded]) -> tuple[Batch, Batch]:
    return Batch.of(rows, PAD), Batch.packed([rows], PAD)


def test_limits_cut_down_to_documents_and_no_further():
    rows = random_rows(7, (3, 30), vocab=63)
    for batch in padded_and_packed([Encoded([i + 1 for i in row.ids], row.trained) for row in rows]):
        parts = Limits(64, most_tokens=1).fit([batch])
        assert [part.tokens for part in parts] == [len(row) for row in rows]
        assert [part.size for part in parts] == [len(row) for row in rows]
        (whole,) = Limits(64, most_tokens=batch.size).fit([batch])
        assert whole is batch


REAL = """
import resource, sys
from pathlib import Path
import psutil
from qlite.training import run as train
from tests.training.test_oom import recipe_of, large_rows
from tests.tiny_run import run

folder, room = Path(sys.argv[1]), int(sys.argv[2])
recipe = recipe_of(folder, {}, **large_rows(folder))
prepare = train.prepare

def prepare_and_limit(*args):
    parts = prepare(*args)
    if room:
        in_use = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (in_use + room, resource.RLIM_INFINITY))
    return parts

train.prepare = prepare_and_limit
seen = run(recipe)
print("retries", [report.oom_retries for report in seen.steps], [note for note in seen.notes if "out of memory" in note])
"""


def large_rows(folder: Path) -> dict:
    """Write 32 rows of 700 tokens or so, and return what a recipe says to read all of them at once."""
    letters = "abcdefghijklmnopqrstuvwxyz012345"
    rows = [json.dumps({"prompt": letter * 330, "completion": letter.upper() * 350}) for letter in letters]
    (folder / "large.jsonl").write_text("\n".join(rows))
    steps = {"steps": 2, "micro_batch": 32, "accumulation": 1, "tokens": 1024, "eval_every": 0, "exact_match_rows": 0}
    return {"train": steps, "data": {"train": str(folder / "large.jsonl")}, "memory": {"checkpointing": "none"}}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's addresses holds on Linux")
def test_a_run_whose_memory_really_ends_gets_through_with_the_same_adapter(tmp_path):
    told = {}
    for name, room in (("free", 0), ("small", 120 << 20)):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", REAL, str(tmp_path / name), str(room)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
        told[name] = done.stdout
    assert "retries [0, 0] []" in told["free"]
    assert "out of memory in the" in told["small"]
    mine, wanted = adapter(tmp_path / "small"), adapter(tmp_path / "free")
    assert max((mine[name] - wanted[name]).abs().max() for name in mine) < 1e-5
