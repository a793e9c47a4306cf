"""Pieces of tools/bench.py that want a process of their own: what is trained on, counts of a step, loading."""

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bench_sides

# Torch and the libraries are imported by the pieces: what one imports is a part of its memory.

SMALL, LARGE = "SmolLM2-135M", "Llama of 1.1 billion weights"
CARDS = ("RTX 3060", "RTX 4070", "RTX 4090")


def folder_of(out: Path, model: str, tokens: int) -> Path:
    """Return where the base and the rows of ``tokens`` tokens lie."""
    return out / f"{model} {tokens}".replace(" ", "_")


def here(told: dict) -> Path:
    return folder_of(Path(told["out"]), told["model"], told["tokens"])


def prepare(told: dict) -> None:
    """Write base, rows and ids: the rows are texts of words that are one token each, so all sides know the ids."""
    import peer_memory
    from transformers import AutoTokenizer

    from qlite.files import is_whole, write_json, write_text

    folder, small = here(told), folder_of(Path(told["out"]), SMALL, 512)
    if not is_whole(small / "base"):
        peer_memory._write_base(small / "base")
    if told["model"] == LARGE and not is_whole(folder / "base"):
        _write_large(folder / "base", small / "base")
    elif not (folder / "base").exists():
        (folder / "base").symlink_to(small / "base")
    tokenizer, chance = AutoTokenizer.from_pretrained(small / "base"), random.Random(0)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [number for number, name in enumerate(names) if name[0] == "\u0120" and name[1:].isascii() and name[1:].isalpha()]
    rows = [chance.choices(words, k=told["tokens"] - 1) for _ in range(told["micro_batch"] * 32)]
    texts = [tokenizer.decode(row) for row in rows]
    assert [tokenizer(text)["input_ids"] for text in texts] == rows
    write_text(folder / "rows.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_json(folder / "ids.json", [[*row, tokenizer.eos_token_id] for row in rows])


def _write_large(folder: Path, tokenizer_of: Path) -> None:
    """Write a Llama with TinyLlama's sizes, random weights and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from qlite.formats.merged import write_merged

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer)))
    write_merged(folder, model, tokenizer, None, torch.bfloat16, lambda *_: None)


# Counts


def counts_of_qlite(told: dict, **keys: object) -> None:
    from qlite.recipe.read import build_recipe
    from qlite.training.run import prepare

    folder = here(told)
    tables = {
        "base": {"model": str(folder / "base"), "bits": 4, "dtype": told["dtype"]},
        "method": {"rank": told["rank"], "alpha": told["alpha"]},
        "optimizer": {"name": "adamw", "lr": told["lr"]},
        "data": {"train": str(folder / "rows.jsonl"), "loss_on": "all"},
        "train": {"steps": 2, "micro_batch": told["micro_batch"], "accumulation": 1, "tokens": told["tokens"]},
        "memory": {"plan": "off", "checkpointing": "block", **keys},
        "parallel": {"device": "cpu"},
        "output": {"dir": f"{told['out']}/counts"},
    }

    class Quiet:
        def note(self, message: str) -> None: ...

        def phase(self, *_: object) -> None: ...

    parts = prepare(build_recipe(tables, "bench"), Quiet())
    with counting() as count:
        parts.stepper.step(parts.batches.step(1), parts.optimizer, 1.0, seed=(0, 1))
    linears = [module for _, module in parts.model.named_modules() if hasattr(module, "packed_tensors")]
    write_counts(told, "counts of qlite" + (", attention kept" if keys else ""), count, len(linears))


def counts_of_peft(told: dict) -> None:
    from transformers import TrainerCallback

    folder = here(told)
    work = {**told, "base": str(folder / "base"), "ids": str(folder / "ids.json"), "steps": 1}
    contexts = []

    class Counting(TrainerCallback):
        def on_step_begin(self, *_, **__):
            contexts.append(counting())
            contexts.append(contexts[0].__enter__())

        def on_step_end(self, *_, **__):
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
            self.count += func.name().partition("::")[2] in ("dequantize_4bit", "gemv_4bit", "gemm_4bit")
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
    base = Base(model=str(here(told) / "base"), cache=cache)
    began = time.perf_counter()
    base.load(torch.device("cpu"), lambda *_: None)
    write_load(told, time.perf_counter() - began)


def load_of_transformers(told: dict) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    import bitsandbytes  # noqa: F401  its import is no part of loading

    began = time.perf_counter()
    AutoModelForCausalLM.from_pretrained(here(told) / "base", quantization_config=nf4, dtype=torch.bfloat16)
    write_load(told, time.perf_counter() - began)


def write_load(told: dict, seconds: float) -> None:
    (Path(told["out"]) / "load.json").write_text(json.dumps({"seconds": seconds, **bench_sides.memory()}), encoding="utf-8")


PIECES = {
    "prepare": prepare,
    "counts of qlite": counts_of_qlite,
    "counts of qlite, attention kept": lambda told: counts_of_qlite(told, checkpointing="attention"),
    "counts of PEFT + Trainer": counts_of_peft,
    "load by transformers": load_of_transformers,
    "load by qlite": lambda told: load_of_qlite(told, cache=False),
    "load by qlite, cached": lambda told: load_of_qlite(told, cache=True),
}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    PIECES[sys.argv[1]](json.loads(sys.argv[2]))
