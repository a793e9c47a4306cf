"""Does an exported model answer as the run it came from? Greedy answers of both to the run's held-out prompts.

    python tools/check_export.py runs/quickstart [--prompts 20]

The run is opened as ``python -m qlite.generate`` opens it (quantised base, adapter beside it); the export is loaded by
transformers alone, in the dtype it was written in.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlite.errors import ExportError, RecipeError, RunError
from qlite.evaluate import held_out
from qlite.serving.answer import Sampling, answer_batch
from qlite.training.console import open_console
from qlite.training.open_run import open_run
from qlite.training.run_folder import find_run
from qlite.verb import run_verb


def main(argv: list[str]) -> None:
    """Print how many answers are equal, and those that are not; exit 4 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run folder; without it the newest finished one under runs/")
    parser.add_argument("--export", type=Path, help="merged folder; by default merged-fp16 inside the run's")
    parser.add_argument("--prompts", type=int, default=20)
    args = parser.parse_args(argv)
    if args.prompts < 1:
        raise RecipeError(f"--prompts {args.prompts}: should be 1 or more")
    run = find_run(args.run)
    with open_console(f"check export  {run.path}") as console:
        opened = open_run(run, "cpu", console.phase)
        opened.attach()
        questions = held_out(opened, args.prompts, console).questions
    if not questions:
        raise RecipeError(f'"{run.path}": no held-out row of this run asks a question; nothing was compared')
    sampling = Sampling(max_tokens=opened.recipe.train.answer_tokens)
    live = [answer_batch(opened.base.model, opened.encoder, [question.prompt], sampling)[0] for question in questions]
    prompts = [question.messages for question in questions]
    exported = answers_of_export(args.export or run.path / "merged-fp16", prompts, sampling.max_tokens)
    different = [pair for pair in zip(live, exported, strict=True) if pair[0] != pair[1]]
    for ours, theirs in different:
        print(f"run:    {ours}\nexport: {theirs}")
    print(f"{len(prompts) - len(different)} of {len(prompts)} greedy answers are the same")
    if different:
        raise ExportError(f"{len(different)} answers differ")


def answers_of_export(folder: Path, prompts: list[list[dict]], max_tokens: int) -> list[str]:
    """Return the greedy answers of the model in ``folder``, by transformers alone."""
    if not (folder / "config.json").is_file():
        raise RunError(f'"{folder}" is no merged folder; first: python -m qlite.export --merge')
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    print(f"{folder}: {model.dtype}, missing keys {len(info['missing_keys'])}, unexpected keys {len(info['unexpected_keys'])}")
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ExportError("its weights are not those that its config.json describes")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            new = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False)
        answers.append(tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


if __name__ == "__main__":
    run_verb(main)
