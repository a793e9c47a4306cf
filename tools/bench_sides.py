"""The sides of tools/bench.py: each trains the same rows in its own library, one step whenever it is told to.

A side is a process of its own, in an environment that has its library; those of the peers lack qlite. It prints a line of JSON when it is
ready and one after every step, and waits for a line on its input before each step.
"""

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path


class Turns:
    """Steps in turns with the other sides."""

    def __init__(self, steps: int):
        self._left = steps
        self._began = time.perf_counter()

    def ready(self) -> None:
        """Say that the next thing is a step, and wait to be told to take it."""
        wait_for_card()
        self._say(load_seconds=time.perf_counter() - self._began)
        self._wait()

    def step_done(self) -> None:
        """Say how long the step took and what the process holds; wait for the next, if there is one."""
        wait_for_card()
        self._say(seconds=time.perf_counter() - self._began)
        self._left -= 1
        if self._left:
            self._wait()

    def _say(self, **facts: float) -> None:
        print("@" + json.dumps({**facts, **memory()}), flush=True)

    def _wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self._began = time.perf_counter()


class Anonymous(threading.Thread):
    """Looks every 5 ms at how many bytes this process holds that no file has, and keeps the most."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most = 0

    def run(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        with open("/proc/self/statm", encoding="ascii") as statm:
            while True:
                statm.seek(0)
                _, resident, of_files, *_ = map(int, statm.read().split())
                self.most = max(self.most, (resident - of_files) * page)
                time.sleep(0.005)


ANONYMOUS = Anonymous()


def card():
    """Return ``torch.cuda`` if this process has used a card."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def wait_for_card() -> None:
    """Wait until the card has done what it was given."""
    if cuda := card():
        cuda.synchronize()


def memory() -> dict[str, int]:
    """Return the most resident bytes that this process had, and the most anonymous ones; on a card also torch's own."""
    (most,) = (line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    found = {"process": int(most.split()[1]) * 1024, "anonymous": ANONYMOUS.most}
    if cuda := card():
        found |= {"reserved": cuda.max_memory_reserved(), "allocated": cuda.max_memory_allocated()}
    return found


def rows_of(work: dict) -> list[dict]:
    """Return the rows as a Trainer takes them."""
    ids = json.loads(Path(work["ids"]).read_text(encoding="utf-8"))
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in ids]


# qlite


def recipe_tables(work: dict) -> dict[str, dict]:
    """Return the work as a recipe of ours, ``work["keys"]`` over it: per-block checkpointing, every token trained, a row a line."""
    tables = {
        "base": {"model": work["base"], "bits": 4, "dtype": work["dtype"]},
        "method": {"rank": work["rank"], "alpha": work["alpha"]},
        "optimizer": {"name": work["optimizer"], "lr": work["lr"]},
        "data": {"train": work["rows"], "loss_on": "all"},
        "train": {"steps": work["steps"], "micro_batch": work["micro_batch"], "accumulation": 1, "tokens": work["tokens"]},
        "memory": {"checkpointing": "block"},
        "parallel": {"device": work["device"]},
        "output": {"dir": f"{work['out']}/qlite"},
    }
    for key, value in work["keys"].items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = value
    return tables


def run_qlite(work: dict, turns: Turns) -> None:
    """Train as ``python -m qlite.train`` does; the steps are the run's own."""
    from qlite import device
    from qlite.recipe.read import build_recipe
    from qlite.training.run import prepare
    from qlite.training.run_folder import RunFolder
    from qlite.training.state import TrainState
    from qlite.training.steps import take_steps

    if work["allocator"] == "untouched":
        device.keep_freed_memory = device.give_back_freed = lambda *_: None

    class Watching:
        def note(self, message: str) -> None:
            print(message, file=sys.stderr)

        def phase(self, *_: object) -> None: ...

        def step(self, report) -> None:
            turns.step_done()

    recipe = build_recipe(recipe_tables(work), "bench")
    run, watching = RunFolder(Path(recipe.output.dir)), Watching()
    parts = prepare(recipe, watching)
    run.discard()
    run.begin(recipe, parts.identity, parts.data.encoder.template, parts.machine)
    turns.ready()
    take_steps(recipe, parts, run, watching, TrainState())


# The peers


def clock(turns: Turns):
    """Return a callback of transformers' Trainer that takes turns."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns.ready()

        def on_step_end(self, *_, **__):
            turns.step_done()

    return Clock()


def trainer_arguments(work: dict) -> dict:
    """Return what Trainer and TRL are told alike."""
    return {
        "output_dir": f"{work['out']}/peer",
        "use_cpu": work["device"] == "cpu",
        "bf16": work["dtype"] == "bfloat16",
        "optim": work["optimizer"],
        "learning_rate": work["lr"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "max_steps": work["steps"],
        "per_device_train_batch_size": work["micro_batch"],
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def quantised(work: dict):
    """Return the base in NF4, as PEFT's guide to quantised models loads it, and its LoRA."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, work["dtype"])
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    where = {} if work["device"] == "cpu" else {"device_map": {"": 0}}
    model = AutoModelForCausalLM.from_pretrained(work["base"], quantization_config=nf4, dtype=dtype, **where)
    lora = LoraConfig(r=work["rank"], lora_alpha=work["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return model, lora


def peft_trainer(work: dict, *callbacks):
    """Return PEFT and transformers' Trainer, ready to train."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments, default_data_collator

    model, lora = quantised(work)
    model = get_peft_model(prepare_model_for_kbit_training(model, use_gradient_checkpointing=True), lora)
    arguments = TrainingArguments(**trainer_arguments(work))
    rows = rows_of(work)
    return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=list(callbacks))


def run_trainer(work: dict, turns: Turns) -> None:
    """PEFT and transformers' Trainer."""
    peft_trainer(work, clock(turns)).train()


def run_trl(work: dict, turns: Turns) -> None:
    """PEFT and TRL's SFTTrainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, lora = quantised(work)
    arguments = SFTConfig(**trainer_arguments(work), max_length=work["tokens"], packing=False)
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows_of(work)])
    SFTTrainer(model=model, args=arguments, train_dataset=rows, peft_config=lora, callbacks=[clock(turns)]).train()


def run_unsloth(work: dict, turns: Turns) -> None:
    """unsloth, on a CPU its CPU backend, with TRL's SFTTrainer, as its notebooks have it."""
    import torch
    import unsloth  # noqa: F401  before the libraries that it patches
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    dtype = getattr(torch, work["dtype"])
    model, tokenizer = FastLanguageModel.from_pretrained(work["base"], max_seq_length=work["tokens"], load_in_4bit=True, dtype=dtype)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=work["rank"], lora_alpha=work["alpha"], lora_dropout=0, target_modules=targets, use_gradient_checkpointing=True
    )
    arguments = SFTConfig(**trainer_arguments(work), max_length=work["tokens"], packing=False)
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows_of(work)])
    SFTTrainer(model=model, processing_class=tokenizer, args=arguments, train_dataset=rows, callbacks=[clock(turns)]).train()


# What nobody can be faster than


def run_limit(work: dict, turns: Turns) -> None:
    """The products that a checkpointed step has, each alone and into memory that is there: no other work, no other traffic.

    Of every frozen linear y = x W^T in a block: forward, again in the backward pass, and the gradient of x; of the head, which is not
    computed again, two; of attention, T x T for each head: two products forward, two again, and four for the gradients. LoRA's own are
    1 % of these and left out.
    """
    import torch

    dtype, config = getattr(torch, work["dtype"]), json.loads((Path(work["base"]) / "config.json").read_text(encoding="utf-8"))
    rows, tokens = work["micro_batch"] * work["tokens"], work["tokens"]
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = config.get("head_dim") or width // heads
    own, shared = heads * size, config["num_key_value_heads"] * size
    block = [(width, own), (width, shared), (width, shared), (own, width), (width, inner), (width, inner), (inner, width)]

    def random(*sizes: int):
        return torch.randn(*sizes).to(work["device"], dtype)

    def product(into: int, out: int):
        x, weight, y = random(rows, into), random(out, into), random(rows, out)
        grad = torch.empty_like(x)
        return lambda times: [torch.mm(x, weight.T, out=y) for _ in range(times)] and torch.mm(y, weight, out=grad)

    def attention():
        q = random(work["micro_batch"] * heads, tokens, size)
        scores = torch.bmm(q, q.transpose(1, 2))
        context = torch.empty_like(q)

        def run() -> None:
            for _ in range(4):
                torch.bmm(q, q.transpose(1, 2), out=scores)
                torch.bmm(scores, q, out=context)

        return run

    def flash():
        q, k, v = (random(work["micro_batch"], number, tokens, size).requires_grad_() for number in (heads, heads, heads))

        def run() -> None:
            for _ in range(2):
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(out, (q, k, v), q)

        return run

    linears = {shape: product(*shape) for shape in {*block, (width, config["vocab_size"])}}
    attend = attention() if work["device"] == "cpu" else flash()
    turns.ready()
    for _ in range(work["steps"]):
        for _ in range(config["num_hidden_layers"]):
            for shape in block:
                linears[shape](2)
            attend()
        linears[width, config["vocab_size"]](1)
        turns.step_done()


SIDES = {"qlite": run_qlite, "trainer": run_trainer, "trl": run_trl, "unsloth": run_unsloth, "limit": run_limit}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    ANONYMOUS.start()
    given = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    with contextlib.suppress(BrokenPipeError):
        SIDES[sys.argv[1]](given, Turns(given["steps"]))
