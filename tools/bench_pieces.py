"""Pieces of tools/bench.py that want a process of their own: what is trained on, counts of a step, loading."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bench_sides

# Torch and the libraries are imported by the pieces: what one imports is a part of its memory.

SMALL, LARGE, LLAMA7B = "SmolLM2-135M", "Llama of 1.1 billion weights", "Llama of 7 billion weights"
SIZES = {
    LARGE: {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4},
    LLAMA7B: {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
"""TinyLlama's and Llama 2 7B's."""
CARDS = ("RTX 3060", "RTX 4070", "RTX 4090")
ROWS = 128
"""Of each length; a run that takes more begins again with the first."""


def places(out: Path, model: str, tokens: int) -> dict[str, str]:
    """Return where the base and the rows of ``tokens`` tokens lie, as the sides are told."""
    base, rows = out / model.replace(" ", "_"), out / f"rows_{tokens}"
    return {"base": str(base), "rows": str(rows / "rows.jsonl"), "ids": str(rows / "ids.json")}


def prepare(told: dict) -> None:
    """Write base and rows, each once. The large base has the small one's tokenizer, so both have the same rows."""
    import peer_memory
    from transformers import AutoTokenizer

    from qlite.files import is_whole

    small, base = Path(places(Path(told["out"]), SMALL, 0)["base"]), Path(told["base"])
    if not is_whole(small):
        peer_memory.write_base(small)
    if not is_whole(base):
        _write_random(base, SIZES[told["model"]], small, told["device"])
    if not Path(told["ids"]).is_file():
        peer_memory.write_rows(Path(told["ids"]).parent, AutoTokenizer.from_pretrained(small), ROWS, told["tokens"])


def _write_random(folder: Path, sizes: dict[str, int], tokenizer_of: Path, device: str) -> None:
    """Write a Llama of ``sizes`` with random weights, drawn on ``device`` if it has room for them, and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from qlite.formats.merged import write_merged

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer))
    with torch.device("meta"):
        needed = sum(weight.nbytes for weight in LlamaForCausalLM(config).parameters())
    has_room = device == "cuda" and torch.cuda.mem_get_info()[0] > 1.1 * needed
    with torch.device("cuda" if has_room else "cpu"):  # billions of random numbers
        model = LlamaForCausalLM(config)
    write_merged(folder, model, tokenizer, None, torch.bfloat16, lambda *_: None)


# Counts


def counts_of_qlite(told: dict, keys: dict[str, object]) -> None:
    from qlite.model import product_attention
    from qlite.recipe.read import build_recipe
    from qlite.training.run import prepare

    product_attention.are_faster_here = lambda: False  # a card's attention is one kernel, and its counts are meant
    work = {**told, "optimizer": "adamw", "keys": {"memory.plan": "off", **keys}}

    class Quiet:
        def note(self, message: str) -> None: ...

        def phase(self, *_: object) -> None: ...

    parts = prepare(build_recipe(bench_sides.recipe_tables(work), "bench"), Quiet())
    parts.stepper.step(parts.batches.step(1), parts.optimizer, 1.0, seed=(0, 1))  # makes the optimizer's state, and no other does
    with counting() as count:
        parts.stepper.step(parts.batches.step(2), parts.optimizer, 1.0, seed=(0, 2))
    linears = [module for _, module in parts.model.named_modules() if hasattr(module, "packed_tensors")]
    write_counts(told, "counts of qlite" + (", attention kept" if keys else ""), count, len(linears))


def counts_of_peft(told: dict) -> None:
    from transformers import TrainerCallback

    work = {**told, "optimizer": "adamw_torch_fused"}  # Trainer's default; the second of two steps, as of qlite
    contexts = []

    class Counting(TrainerCallback):
        def on_step_begin(self, _, state, *__, **___):
            if state.global_step == 1:
                contexts.append(counting())
                contexts.append(contexts[0].__enter__())

        def on_step_end(self, *_, **__):
            if contexts:
                contexts[0].__exit__(None, None, None)

    trainer = bench_sides.peft_trainer(work, Counting())
    trainer.train()
    linears = [
        name for name, module in trainer.model.named_modules() if type(module).__name__ == "Linear4bit" and name.endswith("base_layer")
    ]
    write_counts(told, "counts of PEFT + Trainer", contexts[1], len(linears))


@contextmanager
def counting() -> Iterator:
    """Give a counter of all that torch runs in the context."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from qlite.memory import work

    class Dequantisations(TorchDispatchMode):
        """How often a packed weight was made dense."""

        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.name().partition("::")[2] in ("dequantize_4bit", "dequantize_nf4", "gemv_4bit", "gemm_4bit")
            return func(*args, **(kwargs or {}))

    counter = work.Work()
    with Dequantisations() as dequantised, counter:
        yield counter
    counter.dequantised = dequantised.count


def write_counts(told: dict, name: str, count, linears: int) -> None:
    from qlite.memory.cards import find_card

    cards = {card: count.seconds(find_card(card)) for card in CARDS}
    facts = {"kernels": count.kernels, "bytes": count.bytes, "flops": count.flops, "dequantised": count.dequantised / linears}
    (Path(told["out"]) / f"{name}.json").write_text(json.dumps({**facts, "cards": cards}), encoding="utf-8")


# Loading


def load_of_qlite(told: dict, cache: bool) -> None:
    import torch

    from qlite import device
    from qlite.model.load import Base

    device.keep_freed_memory()
    base = Base(model=told["base"], cache=cache)
    began = time.perf_counter()
    base.load(torch.device(told["device"]), lambda *_: None)
    bench_sides.wait_for_card()
    write_load(told, time.perf_counter() - began)


def load_of_transformers(told: dict) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    import bitsandbytes  # noqa: F401  its import is no part of loading

    began = time.perf_counter()
    where = {} if told["device"] == "cpu" else {"device_map": {"": 0}}
    AutoModelForCausalLM.from_pretrained(told["base"], quantization_config=nf4, dtype=torch.bfloat16, **where)
    bench_sides.wait_for_card()
    write_load(told, time.perf_counter() - began)


def write_load(told: dict, seconds: float) -> None:
    (Path(told["out"]) / "load.json").write_text(json.dumps({"seconds": seconds, **bench_sides.memory()}), encoding="utf-8")


PIECES = {
    "prepare": prepare,
    "counts of qlite": lambda told: counts_of_qlite(told, {}),
    "counts of qlite, attention kept": lambda told: counts_of_qlite(told, {"memory.checkpointing": "attention"}),
    "counts of PEFT + Trainer": counts_of_peft,
    "load by transformers": load_of_transformers,
    "load by qlite": lambda told: load_of_qlite(told, cache=False),
    "load by qlite, cached": lambda told: load_of_qlite(told, cache=True),
}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    bench_sides.ANONYMOUS.start()
    PIECES[sys.argv[1]](json.loads(sys.argv[2]))
