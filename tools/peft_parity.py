"""Train the same thing in qlite and in a plain PEFT + bitsandbytes loop, and compare the losses step by step.

    python tools/peft_parity.py [--bits 4] [--steps 20] [--rows 4]

Same model (SmolLM2-135M, as in recipes/quickstart.toml), same start of A and B, same batches, same AdamW. What differs:
PEFT holds A and B in float32 beside a bfloat16 model, qlite in bfloat16 with a float32 master. "noise" is what PEFT's own
loop moves by when its A and B are rounded to bfloat16 for the forward pass too: two runs of one algorithm that differ in
rounding alone.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlite import device
from qlite.data.batches import Batch, TokenBatches
from qlite.formats.merged import write_merged
from qlite.formats.peft import adapter_tensors
from qlite.methods.lora import LoRA
from qlite.model.load import Base
from qlite.optim.build import Optimizer
from qlite.recipe.read import read_recipe
from qlite.training.step import Stepper
from qlite.verb import run_verb

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
LR = 5e-4
CPU = torch.device("cpu")


def main(argv: list[str]) -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4, help="rows a step")
    args = parser.parse_args(argv)
    recipe, method = read_recipe(RECIPE), LoRA(rank=8, alpha=16)
    base = Base(model=recipe.base.model, sha256=recipe.base.sha256, bits=args.bits)
    with tempfile.TemporaryDirectory() as folder:
        batches, start, ours = train_qlite(base, method, recipe, args.steps, args.rows)
        save_base(base, Path(folder) / "base")
        theirs = train_peft(Path(folder) / "base", args.bits, method, batches, start, torch.float32)
        rounded = train_peft(Path(folder) / "base", args.bits, method, batches, start, torch.bfloat16)
    show(args.bits, ours, theirs, rounded)


def train_qlite(base: Base, method: LoRA, recipe, steps: int, rows: int) -> tuple[list[Batch], dict, list[float]]:
    """Return the batches, the adapter's start and the losses of qlite's own loop."""
    loaded = base.load(CPU, lambda *_: None)
    data = recipe.data.load(loaded.tokenizer, recipe.train.tokens, lambda _: None)
    device.seed_all(0)
    method.attach(loaded.model)
    start = {name: tensor.detach().clone() for name, tensor in adapter_tensors(loaded.model).items()}
    order = TokenBatches(data.train, rows, 1, 0, data.encoder.pad_id)
    batches = [order.step(number)[0] for number in range(1, steps + 1)]
    optimizer = Optimizer(name="torch_adamw", lr=LR).build(method.param_groups(loaded.model, LR), CPU)
    stepper = Stepper(loaded.model, method, recipe.memory.loss_chunk, CPU)
    return batches, start, [stepper.step([batch], optimizer, clip_norm=1.0).loss for batch in batches]


def save_base(base: Base, folder: Path) -> None:
    """Write the base's bfloat16 weights as a folder that transformers reads."""
    loaded = Base(model=base.model, sha256=base.sha256, bits=16).load(CPU, lambda *_: None)
    write_merged(folder, loaded.model, loaded.tokenizer, loaded.generation_config, torch.bfloat16, lambda *_: None)


def train_peft(folder: Path, bits: int, method: LoRA, batches: list[Batch], start: dict, dtype: torch.dtype) -> list[float]:
    """Return the losses of a plain PEFT loop whose adapter is kept in float32 and used in ``dtype``."""
    config = {
        4: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        ),
        8: BitsAndBytesConfig(load_in_8bit=True),
        16: None,
    }[bits]
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    lora = LoraConfig(r=method.rank, lora_alpha=method.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    set_peft_model_state_dict(model, start)
    model.train()
    tensors = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in tensors)
    optimizer = torch.optim.AdamW(tensors, lr=LR, weight_decay=0.0)
    losses = []
    for batch in batches:
        exact = [p.detach().clone() for p in tensors]
        for p in tensors:
            p.data = p.data.to(dtype).float()
        loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
        loss.backward()
        for p, value in zip(tensors, exact, strict=True):
            p.data = value
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def show(bits: int, ours: list[float], theirs: list[float], rounded: list[float]) -> None:
    """Print the losses side by side and the largest differences."""
    table = Table(title=f"losses, {bits}-bit base")
    for heading in ("step", "qlite", "PEFT", "qlite - PEFT", "noise"):
        table.add_column(heading, justify="right")
    for step, (a, b, c) in enumerate(zip(ours, theirs, rounded, strict=True), start=1):
        table.add_row(str(step), f"{a:.5f}", f"{b:.5f}", f"{a - b:+.5f}", f"{c - b:+.5f}")
    Console().print(table)
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    noise = max(abs(c - b) for c, b in zip(rounded, theirs, strict=True))
    print(f"largest difference {difference:.5f}, largest noise {noise:.5f}, loss {theirs[0]:.3f} -> {theirs[-1]:.3f}")


if __name__ == "__main__":
    run_verb(main)
