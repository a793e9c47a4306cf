"""What tools/gpu_check.py checks of a card's memory: offloading, a full card, the plan against the card, a run that goes on, spilling."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from gpu_promises import Bench, Peak, Result, at_most, distance, is_so, mib, percent, skipped, told
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlite import device
from qlite.data.batches import Batch
from qlite.errors import MachineError, ModelError, RecipeError
from qlite.memory.cards import find_card
from qlite.memory.plan import CONTEXT_BYTES
from qlite.methods.base import trainable_tensors
from qlite.methods.lora import LoRA
from qlite.model.head import hidden_states
from qlite.model.lowering import lower_memory
from qlite.model.shapes import base_shapes
from qlite.offload import frozen_tensors
from qlite.optim.build import Optimizer
from qlite.recipe.read import read_recipe
from qlite.recipe.schema import Memory, Recipe
from qlite.training.forecast import forecast, worst_workload
from qlite.training.run_folder import RunFolder
from qlite.training.step import Stepper
from qlite.units import GIB, KIB, MIB
from tests.tiny import random_rows, tiny_llama
from tests.tiny_run import Watcher, run, tiny_recipe
from tests.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[1]
BLOCKS = 8
ON_HOST = {"saved_inputs = host": {"saved_inputs": "host"}, "embedding = host": {"embedding": "host"}, "base = host": {"base": "host"}}
ROUNDED = {"mlp_chunk": ({"mlp_chunk": 100}, 0.03), "saved_inputs = 8bit": ({"saved_inputs": "8bit"}, 0.15)}
"""Keys after which the gradient is another by rounding, and by how much at most."""
SIZES = {"17M": (256, 4, 8000), "80M": (512, 8, 32000), "350M": (1024, 16, 32000), "1.1B": (2048, 16, 64000)}
"""Hidden size, blocks and vocabulary of random Llamas, by their size."""
KINDS: dict[str, dict] = {
    "4 bit": {},
    "8 bit": {"base": {"bits": 8}},
    "16 bit, packed": {"base": {"bits": 16}, "train": {"packing": True}},
    "lowered": {
        "base": {"embedding_bits": 8, "head_bits": 8},
        "memory": {"saved_inputs": "host", "mlp_chunk": 256, "embedding": "host"},
    },
    "streamed": {"memory": {"base": "host"}},
}


def offload(bench: Bench) -> Iterator[Result]:
    """What lies on the host changes no bit of the gradient, as far as the card repeats its own bits; at most two streamed blocks."""
    for storage in ("4 bit",) if bench.is_quick else ("4 bit", "8 bit", "16 bit"):
        model = lowered(bench, {}, storage)
        block = sum(tensor.nbytes for _, _, tensor in frozen_tensors(model.model.layers[0]))
        wanted, whole = gradient(bench, model)
        repeated = max(distance(gradient(bench, model)[0], wanted) for _ in range(1 if bench.is_quick else 3))
        yield told(f"{storage}: gradient, when it is repeated", f"{repeated:.2g}", value=repeated)
        del model
        for name, keys in ON_HOST.items():
            model = lowered(bench, keys, storage)
            # More than once: a race between two streams would not show every time.
            found = [gradient(bench, model) for _ in range(1 if bench.is_quick else 5)]
            del model
            yield at_most(f"{storage}, {name}: gradient", max(distance(grad, wanted) for grad, _ in found), 2 * repeated)
            if name == "base = host":
                saved, least = whole - max(peak for _, peak in found), (BLOCKS - 2.2) * block
                name = f"{storage}, {name}: of {BLOCKS} blocks at most 2.2 on the device"
                yield is_so(name, saved >= least, f"{mib(saved)} saved", f">= {mib(least)}", saved=saved, block=block)
        for name, (keys, limit) in ROUNDED.items():
            yield at_most(f"{storage}, {name}: gradient", distance(gradient(bench, lowered(bench, keys, storage))[0], wanted), limit)


def lowered(bench: Bench, keys: dict, storage: str) -> nn.Module:
    """Return a random Llama, adapted and lowered; blocks that are to lie on the host are never on the card as a whole."""
    device.free_cached(bench.where)  # the one before, whose hooks and modules point at each other
    wide = 128 if bench.is_quick else 1024
    sizes = {"hidden_size": wide, "intermediate_size": 4 * wide, "num_hidden_layers": BLOCKS, "vocab_size": 1024}
    model, memory = tiny_llama(storage, torch.bfloat16, **sizes), Memory(**keys)
    if memory.base == "device":
        model.to(bench.where)
    torch.manual_seed(1)
    LoRA(rank=4, alpha=8.0).attach(model)
    lower_memory(model, memory, bench.where)
    outside = [model.model.norm, model.model.rotary_emb, model.lm_head]
    for module in [*outside, model.model.embed_tokens] if memory.embedding == "device" else outside:
        module.to(bench.where)
    generator = torch.Generator().manual_seed(5)
    for parameter in trainable_tensors(model).values():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter)
    return model.train()


def gradient(bench: Bench, model: nn.Module) -> tuple[Tensor, int]:
    """Return the adapter's gradient as one vector, and the most bytes on the device in a pass, weights and all."""
    ids = torch.randint(0, 1024, (2, 64 if bench.is_quick else 2048), generator=torch.Generator().manual_seed(2)).to(bench.where)
    parameters = trainable_tensors(model).values()
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(7)
    with Peak(bench.where, model) as peak:
        states = hidden_states(model, ids).float()
        (states * torch.linspace(-1, 1, states.numel(), device=bench.where).view(states.shape)).sum().backward()
    return torch.cat([parameter.grad.flatten().cpu() for parameter in parameters]), peak.bytes


def out_of_memory(bench: Bench) -> Iterator[Result]:
    """A step that runs out of memory is made again in smaller pieces, with the same loss, and the same weights after it."""
    weights, results, peak = [], [], 0
    batch = Batch.of(random_rows(16, (60, 64) if bench.is_quick else (500, 512)), pad_id=0)
    for is_full in (False, True):
        model, method = tiny_llama("4 bit", hidden_size=256, intermediate_size=1024).to(bench.where), LoRA(rank=4, alpha=8.0)
        method.attach(model)
        # eps is large: AdamW would blow up what is next to nothing.
        optimizer = Optimizer(name="torch_adamw", eps=1e-4).build(method.param_groups(model, 1e-2), bench.where)
        stepper = Stepper(model, method, 128, bench.where)
        with full(bench, model, peak) if is_full else nullcontext(), Peak(bench.where) as measured:
            results.append(stepper.step([batch], optimizer, 1.0, seed=(0,)))
        peak = measured.bytes
        weights.append(torch.cat([parameter.detach().flatten().cpu() for parameter in trainable_tensors(model).values()]))
        del model, optimizer, stepper
    free, small = results
    yield is_so("memory runs out", small.oom_retries > 0 == free.oom_retries, f"{small.oom_retries} times", ">= 1")
    yield at_most("loss", abs(small.loss - free.loss), 1e-4)
    yield at_most("weights after the step", distance(weights[1], weights[0]), 1e-3)


@contextmanager
def full(bench: Bench, model: nn.Module, peak: int) -> Iterator[None]:
    """Let half of ``peak`` bytes be had: on a card by torch's own limit, on a CPU by an error where the model reads more than 4 lines."""
    if bench.has_card:
        device.free_cached(bench.where)
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.5 * peak) / device.total_memory(bench.where))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return

    def refuse(_module: nn.Module, _args: tuple, options: dict) -> None:
        if len(options["input_ids"]) > 4:
            raise torch.OutOfMemoryError("as a full card says it")

    handle = model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def plan(bench: Bench) -> Iterator[Result]:
    """Planned tensor bytes against the most that torch allocated in the run (on a CPU: that the ledger counted)."""
    for size in list(SIZES)[: 1 if bench.is_quick else None]:
        base = save_llama(bench.part(f"base {size}"), *SIZES[size])
        for kind in list(KINDS)[: 2 if bench.is_quick else None]:
            yield from planned_and_measured(bench, f"{size}, {kind}", long_recipe(bench, f"{size} {kind}", base, KINDS[kind]))
    if bench.is_quick:
        return
    overrides = ["train.steps=3", "schedule.warmup_steps=1", "train.exact_match_rows=0", "optimizer.name=paged_adamw8bit"]
    recipe = read_recipe(ROOT / "recipes/quickstart.toml", overrides)
    keys = {f"data.{key}": str(ROOT / f"recipes/data/orders_{key}.jsonl") for key in ("train", "test")}
    recipe = recipe.having({**keys, "parallel.device": bench.where.type, "output.dir": str(bench.part("smollm2") / "run")})
    try:
        recipe.base.tokenizer(lambda *_: None)
    except (ModelError, MachineError) as error:  # no network
        yield skipped("SmolLM2-135M", str(error).splitlines()[0])
        return
    yield from planned_and_measured(bench, "SmolLM2-135M", recipe)


def save_llama(folder: Path, wide: int, blocks: int, vocabulary: int) -> Path:
    """Write a random Llama and a tokenizer into ``folder``."""
    heads = {"num_attention_heads": wide // 64, "num_key_value_heads": wide // 128}
    sizes = {"hidden_size": wide, "intermediate_size": wide * 11 // 4, "num_hidden_layers": blocks, "vocab_size": vocabulary}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False)).bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def long_recipe(bench: Bench, name: str, base: Path, keys: dict) -> Recipe:
    """Return a recipe over rows that are all nearly as long as train.tokens, with ``keys``."""
    tokens, folder = 128 if bench.is_quick else 1024, bench.part(name)
    half, rows = tokens // 2 - 20, folder / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": letter * half, "completion": letter.upper() * half}) for letter in "abcdefghijklmnop"))
    tables = {
        "base": {"model": str(base)},
        "optimizer": {"name": "paged_adamw8bit"},
        "data": {"train": str(rows)},
        "train": {"steps": 3, "accumulation": 2, "tokens": tokens, "eval_every": 0, "exact_match_rows": 0},
        "memory": {"plan": "tell"},
        "parallel": {"device": bench.where.type},
    }
    return tiny_recipe(folder, **{table: {**tables.get(table, {}), **keys.get(table, {})} for table in {**tables, **keys}})


def planned_and_measured(bench: Bench, name: str, recipe: Recipe) -> Iterator[Result]:
    """Run ``recipe``; yield its plan against what was measured, and what lies beside the tensors."""
    device.free_cached(bench.where)
    if bench.has_card:
        torch.cuda.reset_peak_memory_stats()
    steps = run(recipe).steps
    report, retries = steps[-1], sum(each.oom_retries for each in steps)
    memory = report.memory
    record = json.loads((Path(recipe.output.dir) / "memory.json").read_text())
    planned, ledger = (max(peak["bytes"] for peak in phases.values()) for phases in (record["planned"]["phases"], record["measured"]))
    measured = torch.cuda.max_memory_allocated() - workspaces(bench.where) if bench.has_card else ledger
    off, values = measured / planned - 1, {"planned": planned, "measured": measured, "ledger": ledger, "record": record}
    # A plan cuts a packed line into its documents; a card attends to all in one kernel, with less.
    less = 0.05 if recipe.train.packing else 0.03
    good = -less * planned <= measured - planned <= max(0.03 * planned, 2 * MIB)
    limit = f"at most 3 % or 2 MiB more, {percent(less)} less"
    yield is_so(f"{name}: plan", good, f"{mib(measured)} are {percent(off)} off", limit, **values)
    yield is_so(f"{name}: steps made again for want of memory", retries == 0, f"{retries}", "0", value=retries)
    if not bench.has_card:
        yield skipped(f"{name}: reserved, context, seconds")
        return
    words = f"{report.seconds:.3f} s, estimated {estimated_seconds(bench, recipe)}"
    yield told(f"{name}: a step", words, seconds=report.seconds, tokens=report.tokens)
    reserved = torch.cuda.max_memory_reserved()
    yield told(f"{name}: reserved", f"{mib(reserved)}, {percent(reserved / measured - 1)} more", reserved=reserved)
    if memory.driver is None or bench.idle_bytes is None:
        yield skipped(f"{name}: CUDA context", "NVML gives no figure")
        return
    # Other programs that come or go meanwhile would count, too. A data centre's card has a larger context than plans assume.
    context, limit = memory.driver - bench.idle_bytes - memory.reserved, CONTEXT_BYTES if "RTX" in device.describe(bench.where) else GIB
    yield at_most(f"{name}: CUDA context", context, limit, mib, driver=memory.driver, idle=bench.idle_bytes)


def workspaces(where: torch.device) -> int:
    """Return the bytes of cuBLAS's workspaces, which torch allocates as tensors: one for each thread that multiplies, two in training."""
    return 2 * (32 * MIB if torch.cuda.get_device_capability(where) >= (9, 0) else 8 * MIB + 128 * KIB)


def estimated_seconds(bench: Bench, recipe: Recipe) -> str:
    """Return the roofline's estimate of a step on this card, in words; "unknown" where the card is in no table."""
    try:
        card = find_card(device.describe(bench.where).partition(" (")[0])
    except RecipeError:
        return "unknown"
    found = forecast(recipe, base_shapes(recipe.base, lambda *_: None), worst_workload(recipe))
    return f"{found.work.seconds(card) * recipe.train.accumulation:.3f} s"


def resume(bench: Bench) -> Iterator[Result]:
    """A run that is stopped and goes on ends as one that was not."""
    seen: dict[str, Watcher] = {}
    for name, stops in {"in one": [None], "stopped": [3, None]}.items():
        recipe = tiny_recipe(bench.part(name), parallel={"device": bench.where.type})
        for stop_after in stops:
            seen[name] = run(recipe, stop_after)
        is_finished = RunFolder(Path(recipe.output.dir)).is_finished
        yield is_so(f"{name}: ends", is_finished, "finished" if is_finished else "unfinished", "finished")
    losses = [report.loss for report in seen["in one"].steps]
    yield is_so("the loss falls", losses[-1] < losses[0], f"{losses[0]:.3f} to {losses[-1]:.3f}", "falls")
    one, other = (load_file(bench.folder / name / "run/adapter/adapter_model.safetensors") for name in seen)
    # On a CPU the same bytes are promised; a card's sums may be in another order each time.
    yield at_most("the adapter, stopped or not", max(distance(other[key], one[key]) for key in one), 0.01 if bench.has_card else 0.0)


def spill(bench: Bench) -> Iterator[Result]:
    """The figures by which memory that the driver has put on the host is known."""
    if not bench.has_card:
        yield skipped("figures")
        return
    held = torch.empty(GIB // 4, dtype=torch.uint8, device=bench.where)
    memory, overflows = device.MemoryMeter(bench.where).read(), device.overflows_to_host()
    figures = {key: getattr(memory, key) for key in ("reserved", "driver", "total", "spilled")}
    words = ", ".join(f"{key} {'unknown' if size is None else mib(size)}" for key, size in figures.items())
    yield told("figures", f"{words}; this system {'overflows' if overflows else 'does not overflow'} to the host", **figures)
    yield at_most("a card with room", memory.spilled, 0, mib, held=held.nbytes)
    if memory.driver is not None and not overflows:
        beside = memory.driver - memory.reserved
        yield is_so("the driver counts what is reserved", beside >= 0, f"{mib(beside)} beside it", ">= 0", value=beside)
