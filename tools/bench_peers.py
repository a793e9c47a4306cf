"""The peers' sides of tools/bench.py: each trains the same rows in its own library, one step whenever it is told to.

Run by bench.py in an environment that has the peer's library and not qlite. A side prints one line of JSON when it is ready and one
after every step, and waits for a line on its input before the next.
"""

import json
import os
import sys
import time
from pathlib import Path


class Turns:
    """Steps in turns with the other sides."""

    def __init__(self):
        self.imported = time.perf_counter()
        self.began = 0.0

    def ready(self) -> None:
        """Say that the next thing is a step, and wait to be told to take it."""
        self._say({"ready": True})
        self._wait()

    def step_done(self, is_last: bool) -> None:
        """Say how long the step took and what the process holds; wait for the next."""
        self._say({"seconds": time.perf_counter() - self.began, **memory()})
        if not is_last:
            self._wait()

    def _say(self, facts: dict) -> None:
        print("@" + json.dumps(facts), flush=True)

    def _wait(self) -> None:
        sys.stdin.readline()
        self.began = time.perf_counter()


def memory() -> dict[str, int]:
    """Return the largest and the anonymous bytes of this process, by the kernel's count."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "RssAnon"))}
    return {"process": found["VmHWM"], "anonymous": found["RssAnon"]}


def rows_of(work: dict) -> list[dict]:
    ids = json.loads(Path(work["ids"]).read_text(encoding="utf-8"))
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in ids]


def clock(turns: Turns, steps: int):
    """Return a callback of transformers' Trainer that takes turns."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns.ready()

        def on_step_end(self, arguments, state, *_, **__):
            turns.step_done(state.global_step >= steps)

    return Clock()


def trainer_arguments(work: dict) -> dict:
    """Return what Trainer and TRL are told alike."""
    return {
        "output_dir": work["out"],
        "use_cpu": True,
        "bf16": True,
        "optim": "adamw_torch",
        "learning_rate": work["lr"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "max_steps": work["steps"],
        "per_device_train_batch_size": work["rows"],
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

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(work["base"], quantization_config=nf4, dtype=torch.bfloat16)
    lora = LoraConfig(r=work["rank"], lora_alpha=work["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return model, lora


def run_trainer(work: dict, turns: Turns) -> None:
    """PEFT and transformers' Trainer."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments, default_data_collator

    model, lora = quantised(work)
    model = get_peft_model(prepare_model_for_kbit_training(model, use_gradient_checkpointing=True), lora)
    arguments = TrainingArguments(**trainer_arguments(work))
    callbacks = [clock(turns, work["steps"])]
    Trainer(model=model, args=arguments, train_dataset=rows_of(work), data_collator=default_data_collator, callbacks=callbacks).train()


def run_trl(work: dict, turns: Turns) -> None:
    """PEFT and TRL's SFTTrainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, lora = quantised(work)
    arguments = SFTConfig(**trainer_arguments(work), max_length=work["tokens"], packing=False)
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows_of(work)])
    SFTTrainer(model=model, args=arguments, train_dataset=rows, peft_config=lora, callbacks=[clock(turns, work["steps"])]).train()


def run_unsloth(work: dict, turns: Turns) -> None:
    """unsloth on its CPU backend, with TRL's SFTTrainer, as its notebooks have it."""
    import unsloth  # noqa: F401  before the libraries that it patches
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(work["base"], max_seq_length=work["tokens"], load_in_4bit=True)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=work["rank"], lora_alpha=work["alpha"], lora_dropout=0, target_modules=targets, use_gradient_checkpointing=True
    )
    arguments = SFTConfig(**trainer_arguments(work), max_length=work["tokens"], packing=False)
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows_of(work)])
    SFTTrainer(model=model, processing_class=tokenizer, args=arguments, train_dataset=rows, callbacks=[clock(turns, work["steps"])]).train()


SIDES = {"trainer": run_trainer, "trl": run_trl, "unsloth": run_unsloth}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    SIDES[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), Turns())
