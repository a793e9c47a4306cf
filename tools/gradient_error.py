"""How far an adapter's gradient in bfloat16 is from the same in float32: qlite's, by every attention that this CPU has, and PEFT's.

    pip install peft accelerate
    python tools/gradient_error.py [RECIPE] [--lines 4] [--tokens 512] [--seeds 5]

One base quantised to NF4, LoRA of rank 8 on all linears with A and B drawn anew for each seed, the recipe's training rows one behind the
other in lines of --tokens, every token trained. The reference is qlite's own code with everything but the packed weights in float32. PEFT
computes in two ways: with the model as it is loaded, in bfloat16; and as transformers' Trainer has it do, prepared for k-bit training (all
that is not quantised in float32, the states between the blocks with it) and under autocast. The distance is that of all factors' gradients
together, relative to the reference's norm: what rounding leaves is half luck, so it is the mean of the seeds, with the lowest and highest.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training, set_peft_model_state_dict
from peft_parity import CPU, save_base
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlite import device
from qlite.data.batches import Batch
from qlite.data.dataset import Rows
from qlite.data.encode import Encoded
from qlite.errors import DataError
from qlite.formats.peft import adapter_tensors
from qlite.methods.base import trainable_tensors
from qlite.methods.lora import LoRA
from qlite.model import product_attention
from qlite.model.load import Base
from qlite.quant.linear import QuantLinear
from qlite.recipe.read import read_recipe
from qlite.recipe.schema import Recipe
from qlite.training.step import Stepper
from qlite.verb import run_verb

METHOD = LoRA(rank=8, alpha=16)
LOSS_CHUNK = 512


def main(argv: list[str]) -> None:
    """Print the distances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("recipes/quickstart.toml"))
    parser.add_argument("--lines", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args(argv)
    recipe = read_recipe(args.recipe)
    device.set_threads(0)
    base = replace(recipe.base, bits=4, fused=False)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_base(base, Path(folder) / "base")
        for seed in range(args.seeds):
            for name, distance in distances(base, recipe, (args.lines, args.tokens), seed, Path(folder) / "base").items():
                found.setdefault(name, []).append(distance)
    print(f"{args.lines} x {args.tokens} tokens, {args.seeds} seeds, {device.describe(CPU)}")
    print("| | distance to float32's gradient |\n|---|---|")
    for name, own in found.items():
        print(f"| {name} | {statistics.mean(own):.4f} ({min(own):.4f} to {max(own):.4f}) |")


def distances(base: Base, recipe: Recipe, size: tuple[int, int], seed: int, folder: Path) -> dict[str, float]:
    """Return the distance of each side's gradient for a batch of ``size``: lines, tokens; ``folder`` has the base as PEFT loads it."""
    loaded = base.load(CPU, lambda *_: None)
    batch = lines(recipe.data.load(loaded.tokenizer, recipe.train.tokens, lambda _: None).train, *size)
    device.seed_all(seed)
    METHOD.attach(loaded.model)
    draw_B(loaded.model, seed)
    start = {name: tensor.detach().clone() for name, tensor in adapter_tensors(loaded.model).items()}
    found = {}
    for name, are_taken in {"qlite, torch's attention kernel": False, "qlite, attention by products": True}.items():
        if not are_taken or product_attention.are_faster_here():
            with attention_by_products(are_taken):
                found[name] = gradient_of(loaded.model, batch)
    found["PEFT, in bfloat16"] = gradient_of_peft(folder, batch, start, is_prepared=False)
    found["PEFT, prepared for k-bit training"] = gradient_of_peft(folder, batch, start, is_prepared=True)
    in_float32(loaded.model)
    exact = gradient_of(loaded.model, batch)
    joined = {name: torch.cat([own[key].flatten() for key in exact]) for name, own in {**found, "": exact}.items()}
    reference = joined.pop("")
    return {name: ((own - reference).norm() / reference.norm()).item() for name, own in joined.items()}


def lines(rows: Rows, count: int, tokens: int) -> Batch:
    """Return ``count`` lines of ``tokens`` tokens of ``rows``, one behind the other, all of them trained."""
    ids: list[int] = []
    for row in rows:
        ids.extend(map(int, row.ids))
        if len(ids) >= count * tokens:
            return Batch.of([Encoded(ids[place * tokens :][:tokens], [True] * tokens) for place in range(count)], 0)
    raise DataError(f"--lines {count} --tokens {tokens}: data.train has {len(ids):,} tokens; ask for fewer")


def draw_B(model: nn.Module, seed: int) -> None:
    """Draw every B: where it is zero, A has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in trainable_tensors(model).items():
        if "lora_B" in name:
            tensor.data.copy_(0.02 * torch.randn(tensor.shape, generator=generator))


@contextmanager
def attention_by_products(are_taken: bool) -> Iterator[None]:
    """Compute attention by products, or by torch's kernel, in the context."""
    asked = product_attention.are_faster_here
    product_attention.are_faster_here = lambda: are_taken
    try:
        yield
    finally:
        product_attention.are_faster_here = asked


def in_float32(model: nn.Module) -> None:
    """Let ``model`` compute in float32, over the same packed weights."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.compute_dtype = torch.float32
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dtype == torch.bfloat16:
            tensor.data = tensor.data.float()


def gradient_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the gradient of each factor, in float64, under its name in PEFT's files."""
    stepper = Stepper(model, METHOD, LOSS_CHUNK, CPU)
    for tensor in trainable_tensors(model).values():
        tensor.grad = None
    stepper.accumulate([batch])
    grads = {tensor: tensor.grad for tensor in trainable_tensors(model).values()}
    return {name: grads[tensor].double() for name, tensor in adapter_tensors(model).items()}


def gradient_of_peft(folder: Path, batch: Batch, start: dict[str, Tensor], is_prepared: bool) -> dict[str, Tensor]:
    """Return the same of PEFT's model, its adapter at ``start``, in float32."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    if is_prepared:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(r=METHOD.rank, lora_alpha=METHOD.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    set_peft_model_state_dict(model, start)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_prepared):
        model(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
    return {name.replace(".default", ""): p.grad.double() for name, p in model.named_parameters() if p.requires_grad}


if __name__ == "__main__":
    run_verb(main)
