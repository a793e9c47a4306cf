"""What PEFT + TRL make of the restaurant texts (E2E) that recipes/e2e.toml trains on: losses, predictions and BLEU, seed by seed.

    pip install trl sacrebleu
    python tools/e2e_peers.py ../shared/data/e2e_nlg --seeds 0 1 2 --out build/e2e_peers

The folder holds lora-paper-valid.txt (trained on) and lora-paper-test.txt (tested on: each meaning once, all its texts as
references), one ``meaning||text`` a line. Model, rows and hyperparameters are the recipe's; everything else is what TRL's
SFTTrainer does by default with a 4-bit model and a ``peft_config``. In TRL 1.16 that means: no
``prepare_model_for_kbit_training``, A and B in bfloat16 with an AdamW that holds no float32 copy of them, autocast to
bfloat16. Two things differ from qlite by the library's own reckoning: transformers' warm-up runs the first step at a
learning rate of 0, and the rows are drawn in another order.

Prompt and answer are handed over as two texts: from messages, TRL would also train the line break after the end token.
Each seed ends as OUT/seed-N.json {seed, losses, predictions {meaning: text}, bleu, train_seconds, generate_seconds}, and a
seed that has its file is not run again.
"""

import argparse
import json
import time
import tomllib
from pathlib import Path
from statistics import mean, stdev

# First of the imports that load torch: it shortens the spin of OpenMP's threads, which torch reads once.
from qlite.errors import DataError, RunError

# isort: split
import sacrebleu
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

from qlite.files import is_whole, write_json
from qlite.formats.merged import write_merged
from qlite.model.load import Base
from qlite.verb import run_verb

MODEL_OF = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
TRAIN, TEST = "lora-paper-valid.txt", "lora-paper-test.txt"
END = "<|im_end|>"
LR, WARMUP_STEPS, ROWS, MAX_TOKENS = 5e-4, 10, 16, 256
GENERATE_ROWS, NEW_TOKENS = 64, 96

Pairs = list[tuple[str, str]]


def main(argv: list[str]) -> None:
    """Run the seeds that have no file yet and print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"the folder with {TRAIN} and {TEST}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("build/e2e_peers"), help="the folder of the results")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--meanings", type=int, help="generate for the first so many meanings only")
    args = parser.parse_args(argv)
    train, references = read_pairs(args.folder / TRAIN), references_of(read_pairs(args.folder / TEST))
    references = dict(list(references.items())[: args.meanings])
    print(f"{len(train)} rows to train on, {len(references)} meanings to put into words", flush=True)
    disable_progress_bars()
    disable_progress_bar()
    base = args.out / "base"
    if not is_whole(base):
        save_base(base)
    results = []
    for seed in args.seeds:
        path = args.out / f"seed-{seed}.json"
        if not path.exists():
            write_json(path, run_seed(base, train, references, seed, args.steps))
        results.append(read_result(path, args.steps, references))
    show(results)


def read_pairs(path: Path) -> Pairs:
    """Return (meaning, text) of every line, stripped of white space at both ends.

    Raises:
        DataError: there is no such file, or a line is not ``meaning||text``.
    """
    if not path.is_file():
        raise DataError(f'there is no file "{path}"; the data is in github.com/microsoft/LoRA, examples/NLG/data/e2e')
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        meaning, found, text = line.partition("||")
        if not found or not meaning.strip() or not text.strip():
            raise DataError(f'{path}:{number}: {line[:80]!r} should be "meaning||text"')
        pairs.append((meaning.strip(), text.strip()))
    return pairs


def references_of(pairs: Pairs) -> dict[str, list[str]]:
    """Return every meaning, in order of first appearance, with all its texts."""
    references: dict[str, list[str]] = {}
    for meaning, text in pairs:
        references.setdefault(meaning, []).append(text)
    return references


def save_base(folder: Path) -> None:
    """Write the base's bfloat16 weights as a folder that transformers reads."""
    base = tomllib.loads(MODEL_OF.read_text(encoding="utf-8"))["base"]
    loaded = Base(model=base["model"], sha256=base["sha256"], bits=16).load(torch.device("cpu"), lambda *_: None)
    write_merged(folder, loaded.model, loaded.tokenizer, loaded.generation_config, torch.bfloat16, lambda *_: None)


def run_seed(base: Path, train: Pairs, references: dict[str, list[str]], seed: int, steps: int) -> dict:
    """Train one adapter, let it put every meaning into words, and return what is written about it."""
    trainer = make_trainer(base, train, seed, steps)
    check_what_is_trained(trainer, train)
    start = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()
    predictions = generate(trainer.model, trainer.processing_class, list(references))
    generated = time.perf_counter()
    return {
        "seed": seed,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "predictions": predictions,
        "bleu": bleu(predictions, references),
        "train_seconds": trained - start,
        "generate_seconds": generated - trained,
    }


def make_trainer(base: Path, train: Pairs, seed: int, steps: int) -> SFTTrainer:
    """Return TRL's trainer over a freshly loaded 4-bit base. It seeds everything itself before it makes the adapter."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = SFTConfig(
        output_dir=str(base.parent / "trainer"),
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        max_length=MAX_TOKENS,
        packing=False,
        completion_only_loss=True,
        eos_token=END,
        learning_rate=LR,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP_STEPS,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = Dataset.from_list([{"prompt": prompt_of(tokenizer, meaning), "completion": text} for meaning, text in train])
    return SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)


def prompt_of(tokenizer: PreTrainedTokenizerBase, meaning: str) -> str:
    """Return the chat that asks for a text: the model's own system message, the meaning, the opened answer."""
    return tokenizer.apply_chat_template([{"role": "user", "content": meaning}], tokenize=False, add_generation_prompt=True)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, meaning: str) -> list[int]:
    """Return the same chat as the tokenizer itself encodes it."""
    message = {"role": "user", "content": meaning}
    return tokenizer.apply_chat_template([message], tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]


def check_what_is_trained(trainer: SFTTrainer, train: Pairs) -> None:
    """Assert, over one collated batch, that a loss is on the answer and its end token alone, after the very prompt of generation."""
    tokenizer, pairs = trainer.processing_class, train[:ROWS]
    assert len(trainer.train_dataset) == len(train)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(pairs))])
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert max(lengths) < MAX_TOKENS, "a row is cut off before its end token"
    for (meaning, text), ids, labels in zip(pairs, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        prompt = prompt_ids(tokenizer, meaning)
        trained = [token for token, label in zip(ids, labels, strict=True) if label != -100]
        assert ids[: len(prompt)] == prompt
        assert labels[: len(prompt)] == [-100] * len(prompt)
        assert labels[len(prompt) : len(prompt) + len(trained)] == trained
        assert tokenizer.decode(trained) == text + END
    trainable = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trainable)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    print(f"trained, first row: {tokenizer.decode(trained)!r}; rows of up to {max(lengths)} tokens", flush=True)
    print(f"{len(trainable)} trainable tensors of {sorted(map(str, set(trainable.values())))}", flush=True)


@torch.no_grad()
def generate(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, meanings: list[str]) -> dict[str, str]:
    """Return the greedy answer to each meaning. Rows of like length meet, padded on the left."""
    model.eval()
    end, pad = tokenizer.convert_tokens_to_ids(END), tokenizer.pad_token_id
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=pad, use_cache=True)
    encoded = sorted(((prompt_ids(tokenizer, meaning), meaning) for meaning in meanings), key=lambda pair: len(pair[0]))
    answers = {}
    # On a CPU torch multiplies the strided view that transformers hands the head row by row (see qlite/serving/answer.py).
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        for first in range(0, len(encoded), GENERATE_ROWS):
            chosen = encoded[first : first + GENERATE_ROWS]
            width = max(len(ids) for ids, _ in chosen)
            input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids, _ in chosen])
            mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in chosen])
            new = model.generate(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config)
            for (_, meaning), row in zip(chosen, new[:, width:].tolist(), strict=True):
                answer = row[: row.index(end)] if end in row else row
                answers[meaning] = tokenizer.decode(answer, skip_special_tokens=True).strip()
            print(f"{len(answers)} of {len(encoded)} meanings in words", flush=True)
    finally:
        hook.remove()
    return {meaning: answers[meaning] for meaning in meanings}


def bleu(predictions: dict[str, str], references: dict[str, list[str]]) -> float:
    """Return corpus BLEU in 0 .. 100 over all references (sacrebleu's defaults: 13a tokens, case kept).

    Source: Post 2018, arXiv:1804.08771. None stands where a meaning has fewer texts than another.
    """
    most = max(map(len, references.values()))
    columns = [[texts[place] if place < len(texts) else None for texts in references.values()] for place in range(most)]
    # E2E's texts come with spaces around their punctuation; ``force`` only silences the warning that they do.
    return sacrebleu.corpus_bleu([predictions[meaning] for meaning in references], columns, force=True).score


def read_result(path: Path, steps: int, references: dict[str, list[str]]) -> dict:
    """Return a seed's file.

    Raises:
        RunError: it was made with another number of steps or other meanings.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    if len(result["losses"]) != steps or set(result["predictions"]) != set(references):
        raise RunError(
            f"{path}: has {len(result['losses'])} steps and {len(result['predictions'])} meanings, asked for are {steps} and "
            f"{len(references)}; choose another --out, or remove the file"
        )
    return result


def show(results: list[dict]) -> None:
    """Print one line a seed, then mean and sample standard deviation."""
    table = Table(title="PEFT + TRL on E2E")
    for heading in ("seed", "first loss", "last 10 losses", "BLEU", "train s", "generate s"):
        table.add_column(heading, justify="right")
    columns = [
        [result["losses"][0] for result in results],
        [mean(result["losses"][-10:]) for result in results],
        *([result[key] for result in results] for key in ("bleu", "train_seconds", "generate_seconds")),
    ]
    digits = (3, 3, 2, 0, 0)
    for result, values in zip(results, zip(*columns, strict=True), strict=True):
        table.add_row(str(result["seed"]), *(f"{value:.{places}f}" for value, places in zip(values, digits, strict=True)))
    table.add_section()
    for name, summary in (("mean", mean), ("std", stdev))[: len(results)]:
        table.add_row(name, *(f"{summary(values):.{places}f}" for values, places in zip(columns, digits, strict=True)))
    Console().print(table)


if __name__ == "__main__":
    run_verb(main)
