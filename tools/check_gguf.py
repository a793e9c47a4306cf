"""Does a GGUF export answer in llama.cpp as the run it came from? Ids, greedy answers, and perplexity over the held-out rows.

    pip install llama-cpp-python          # llama.cpp, compiled: some minutes
    python -m qlite.export --gguf f16 RUN && python tools/check_gguf.py RUN [--type f16] [--prompts 20] [--rows 100]
    python -m qlite.export --gguf-adapter RUN && python tools/check_gguf.py RUN --adapter

The run is opened with its quantised base and its adapter beside it, and computes in float32, as llama.cpp sums: bfloat16's rounding
alone moves the perplexity of a prompt's tokens, the same few in every row, by 2 % (tools/LOG.md). With --adapter llama.cpp puts the
adapter on the run's base, not quantised and written as float32, and that is held to the run over a base that is not quantised either.
Where the base is a GGUF file itself, the adapter on that file is told, too, and held to nothing: beside weights of few bits llama.cpp
rounds what they are multiplied by to 8 bits, a model of its own.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from qlite.errors import ExportError, MachineError, RecipeError, RunError
from qlite.evaluate import Material, held_out
from qlite.formats.gguf_merged import write_merged_gguf
from qlite.formats.gguf_types import TYPES
from qlite.serving.answer import Sampling, answer_all
from qlite.training.console import open_console
from qlite.training.gguf_facts import run_saying
from qlite.training.open_run import OpenRun, open_run
from qlite.training.run_folder import RunFolder, find_run
from qlite.verb import run_verb

MOST_DIFFERENCE = 0.01
"""Of the perplexities, relative."""
Predict = Callable[[list[list[int]]], list[np.ndarray]]
"""From rows of N ids to the log-probabilities of the last N - 1 of each, by those before it; in nats."""
ROWS_AT_ONCE = 8


def in_float32(unquantised: bool) -> dict[str, object]:
    """Return the keys of [base] with which a run computes in float32, ``unquantised`` or not."""
    return {"dtype": "float32", **(dict.fromkeys(("bits", "embedding_bits", "head_bits"), 16) if unquantised else {})}


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-probability, over all tokens of the rows but their first, and over the trained ones."""

    every: float
    trained: float

    @classmethod
    def of(cls, material: Material, predict: Predict) -> "Perplexity":
        rows = [row for row, _ in material.rows]
        every = predict([[int(token) for token in row.ids] for row in rows])
        trained = [values[np.asarray(row.trained[1:], bool)] for values, row in zip(every, rows, strict=True)]
        return cls(*(math.exp(-np.concatenate(values).mean()) for values in (every, trained)))

    def differences(self, other: "Perplexity") -> list[float]:
        """Return how far both are from ``other``'s, relative."""
        return [abs(ours / theirs - 1) for ours, theirs in ((self.every, other.every), (self.trained, other.trained))]


class LlamaCpp:
    """A GGUF file in llama.cpp, perhaps with a GGUF adapter on it."""

    def __init__(self, file: Path, adapter: Path | None, context: int):
        try:
            import llama_cpp
        except ImportError as error:
            raise MachineError(f"llama.cpp cannot be imported ({error}): pip install llama-cpp-python") from error
        options = {"n_ctx": context, "n_batch": context, "logits_all": True, "verbose": False}
        self.llama = llama_cpp.Llama(str(file), lora_path=adapter and str(adapter), **options)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens stand as such; nothing is added."""
        return self.llama.tokenize(text.encode(), add_bos=False, special=True)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits behind each of ``ids``, [N, V] float32."""
        self.llama.reset()
        self.llama.eval(list(ids))
        return self.llama.scores[: len(ids)]

    def predict(self, rows: list[list[int]]) -> list[np.ndarray]:
        """As Predict says."""
        return [_chosen(torch.from_numpy(self.logits(ids)), ids) for ids in rows]

    def answer(self, prompt: Sequence[int], stops: Sequence[int], most: int) -> list[int]:
        """Return the most likely ids behind ``prompt``, up to one of ``stops`` or ``most`` of them."""
        answer: list[int] = []
        token = int(self.logits(prompt)[-1].argmax())
        while token not in stops and len(answer) < most:
            answer.append(token)
            self.llama.eval([token])
            token = int(self.llama.scores[self.llama.n_tokens - 1].argmax())
        return answer


@torch.no_grad()
def predict(model: PreTrainedModel, rows: list[list[int]]) -> list[np.ndarray]:
    """As Predict says; what fills short rows up stands behind them, where they do not see it."""
    found = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        longest = max(map(len, some))
        logits = model(torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in some])).logits
        found += [_chosen(logits[place, : len(ids)], ids) for place, ids in enumerate(some)]
    return found


def _chosen(logits: torch.Tensor, ids: Sequence[int]) -> np.ndarray:
    predicted = logits[:-1].float().log_softmax(-1)
    return predicted[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()


def main(argv: list[str]) -> None:
    """Print the figures; exit 4 unless all ids and answers are equal and the perplexities at most MOST_DIFFERENCE apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run folder; without it the newest finished one under runs/")
    parser.add_argument("--type", default="f16", help="of the export to check: RUN/gguf-TYPE")
    parser.add_argument("--adapter", action="store_true", help="check RUN/gguf-adapter, on the run's base")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--rows", type=int, default=100, help="held-out rows whose perplexity is measured")
    args = parser.parse_args(argv)
    if problems := [
        f"--{key} {value}: should be 1 or more" for key, value in (("prompts", args.prompts), ("rows", args.rows)) if value < 1
    ]:
        raise RecipeError(problems)
    run = find_run(args.run)
    written = exported(run, args)
    with tempfile.TemporaryDirectory(dir=run.path) as folder, open_console(f"check gguf  {run.path}") as console:
        opened = open_run(run, "cpu", console.phase, console.note, in_float32(unquantised=args.adapter))
        base = Path(folder) / "base-f32.gguf"
        if args.adapter:
            write_merged_gguf(base, opened.base, run_saying(opened, "base"), TYPES["f32"], console.phase)
        opened.attach()
        material = held_out(opened, max(args.prompts, args.rows), console)
        material = replace(material, rows=material.rows[: args.rows], questions=material.questions[: args.prompts])
        problems = compare(opened, material, (base, written) if args.adapter else (written, None))
        own = opened.base.checkpoint.files
        if args.adapter and own.gguf is not None:
            compare(opened, material, (own.folder / own.gguf, written))
    if problems:
        raise ExportError("; ".join(problems))


def exported(run: RunFolder, args: argparse.Namespace) -> Path:
    """Return the GGUF file that is checked. Raises RunError where it is missing."""
    folder = run.path / ("gguf-adapter" if args.adapter else f"gguf-{args.type}")
    found = next(folder.glob("*.gguf"), None)
    if found is None:
        option = "--gguf-adapter" if args.adapter else f"--gguf {args.type}"
        raise RunError(f'"{folder}" is not there; first: python -m qlite.export {option} {run.path}')
    return found


def compare(opened: OpenRun, material: Material, given: tuple[Path, Path | None]) -> list[str]:
    """Print how llama.cpp's ids, answers and perplexity compare with the run's; return what is too far apart."""
    model, encoder, most = opened.base.model, opened.encoder, opened.recipe.train.answer_tokens
    longest = max([*(len(row) for row, _ in material.rows), *(len(question.prompt) + most for question in material.questions)])
    cpp = LlamaCpp(*given, context=longest + 1)
    prompts = [question.prompt for question in material.questions]
    same_ids = sum(cpp.ids(encoder.tokenizer.decode(ids)) == list(ids) for ids in prompts)
    ours = answer_all(model, encoder, prompts, Sampling(max_tokens=most))
    theirs = [encoder.decode(cpp.answer(ids, encoder.stop_ids, most)) for ids in prompts]
    different = [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
    for one, other in different:
        print(f"run:       {one}\nllama.cpp: {other}")

    run, file = Perplexity.of(material, partial(predict, model)), Perplexity.of(material, cpp.predict)
    apart = file.differences(run)
    print(f"{given[0].name}{f' with {given[1].name}' if given[1] else ''} in llama.cpp:")
    same = len(prompts) - len(different)
    print(f"{same_ids} of {len(prompts)} prompts get the same ids; {same} of {len(prompts)} greedy answers are the same")
    print(f"perplexity over {len(material.rows)} rows: {file.every:.4f}, the run's {run.every:.4f} ({apart[0]:.3%} apart)")
    print(f"of the trained tokens alone: {file.trained:.5f}, the run's {run.trained:.5f} ({apart[1]:.3%} apart)")
    checks = {
        f"{len(prompts) - same_ids} prompts get other ids": same_ids != len(prompts),
        f"{len(different)} answers differ": bool(different),
        f"perplexities are more than {MOST_DIFFERENCE:.0%} apart": max(apart) > MOST_DIFFERENCE,
    }
    return [problem for problem, is_found in checks.items() if is_found]


if __name__ == "__main__":
    run_verb(main)
