"""Do others measure what ``python -m qlite.evaluate`` does? A run before and after, by lm-evaluation-harness and by qlite.

    pip install 'lm-eval[hf]'        # 0.4.13; in an environment of its own: --python PATH
    python tools/lm_eval_table.py runs/quickstart [--export FOLDER] [--rows 20]

Of the run's held-out rows it makes two local tasks, which anybody can give lm_eval again: the greedy answer, compared letter by
letter, and the likelihood of the expected one. lm_eval then measures the merged folder and the untuned base, written as a folder
like it, with no part of qlite: transformers, float32, one row at a time. qlite's column is the run itself: the quantised base with
its adapter off and on, in the run's own number format. Exit code 4 if they do not agree.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from qlite.errors import DataError, ExportError, MachineError, RecipeError, RunError
from qlite.evaluate import Examination, Material, held_out
from qlite.files import write_json, write_text
from qlite.formats.merged import write_merged
from qlite.serving.answer import Sampling
from qlite.training.console import open_console
from qlite.training.open_run import OpenRun, open_run
from qlite.training.run_folder import find_run
from qlite.verb import run_verb

ANSWERS, LIKELIHOOD = "qlite_answers", "qlite_likelihood"
# bfloat16 in the run, float32 there: a loss of 0.149 moved by 0.0004 (qlite/evaluate.py), and an answer takes another turn where two
# tokens are as good as equally likely.
MOST_LOSS_APART, MOST_ANSWERS_APART = 0.02, 0.05


@dataclass(frozen=True)
class Side:
    """What one program says of one model."""

    exact: int
    loss: float

    def agrees(self, other: "Side", rows: int) -> bool:
        """Return whether both say the same but for rounding: losses in nats, relative to the larger, or 0.002."""
        apart = abs(self.loss - other.loss)
        close = apart <= max(0.002, MOST_LOSS_APART * max(self.loss, other.loss))
        return close and abs(self.exact - other.exact) <= max(1, MOST_ANSWERS_APART * rows)


def main(argv: list[str]) -> None:
    """Print the table; exit 4 if a figure of lm_eval's is another than qlite's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run folder; without it the newest finished one under runs/")
    parser.add_argument("--export", type=Path, help="merged folder; by default merged-fp16 inside the run's")
    parser.add_argument("--rows", type=int, default=20, help="held-out rows to measure on")
    parser.add_argument("--out", type=Path, default=Path("build/lm_eval"), help="folder for tasks, base and what lm_eval writes")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment that has lm-eval")
    args = parser.parse_args(argv)
    if args.rows < 1:
        raise RecipeError(f"--rows {args.rows}: should be 1 or more")
    run = find_run(args.run)
    export = args.export or run.path / "merged-fp16"
    if not (export / "config.json").is_file():
        raise RunError(f'"{export}" is no merged folder; write it with python -m qlite.export --merge, or name another: --export')
    require_lm_eval(args.python)
    with open_console(f"lm-eval  {run.path}") as console:
        opened = open_run(run, "cpu", console.phase)
        write_base(opened, args.out / "base", console.phase)
        opened.attach()
        material = held_out(opened, args.rows, console)
        write_tasks(opened, material, args.out / "tasks")
        sampling = Sampling(opened.recipe.train.answer_tokens)
        examination = Examination(opened, material, ["loss", "exact_match"], sampling, console)
        ours = [_side(each, len(material.questions)) for each in (examination.of_base(), examination.measure("adapter"))]
    del opened, examination  # the memory is lm_eval's now
    theirs = [measure(args.python, folder, args.out, name) for folder, name in ((args.out / "base", "before"), (export, "after"))]
    print_table(ours, theirs, len(material.questions))


def require_lm_eval(python: str) -> None:
    """Raise MachineError if ``python`` has no lm_eval."""
    try:
        found = subprocess.run([python, "-c", "import lm_eval, accelerate"], capture_output=True, text=True)
        reason = "" if found.returncode == 0 else (found.stderr.strip().splitlines() or ["it ends with an error"])[-1]
    except OSError as error:
        reason = error.strerror
    if reason:
        raise MachineError(f"--python {python}: cannot run lm_eval there ({reason}): pip install 'lm-eval[hf]'")


def write_base(opened: OpenRun, folder: Path, progress: object) -> None:
    """Write the untuned base, as the run has it quantised, as a merged folder."""
    base = opened.base
    write_merged(folder, base.model, base.tokenizer, base.generation_config, torch.float16, progress)


def write_tasks(opened: OpenRun, material: Material, folder: Path) -> None:
    """Write both tasks and their rows into ``folder``.

    Raises:
        DataError: the rows ask nothing, cannot be asked as text, or have a loss on more than their last answer.
    """
    tokenizer, rows = opened.base.tokenizer, [row for row, _ in material.rows]
    if not material.questions:
        raise DataError("the held-out rows are raw text, which asks nothing; lm_eval measures questions and answers here")
    questions, likelihoods = [], []
    for question in material.questions:
        questions.append({"prompt": text_of(tokenizer, question.prompt), "answer": question.references[0]})
    for row in rows:
        ids, start = list(map(int, row.ids)), row.answer_start
        trained = [index for index, counts in enumerate(row.trained) if counts]
        if not start or trained != list(range(start, len(trained) + start)):
            raise DataError("a held-out row has a loss on more than its last answer (data.loss_on), which no task of lm_eval's weighs")
        end = trained[-1] + 1
        whole, prompt = text_of(tokenizer, ids[:end]), text_of(tokenizer, ids[:start])
        # lm_eval counts the white space at a prompt's end as part of the answer: it is weighed alone, too, and taken off.
        space = prompt[len(prompt.rstrip()) :]
        likelihoods.append({"prompt": prompt, "answer": whole[len(prompt) :], "tokens": end - start, "sign": 1})
        if space:
            likelihoods.append({"prompt": prompt.rstrip(), "answer": space, "tokens": 0, "sign": -1})
    stops = [text_of(tokenizer, [token]) for token in opened.encoder.stop_ids]
    until = {"until": stops, "do_sample": False, "max_gen_toks": opened.recipe.train.answer_tokens}
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    clean = [{"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}]
    asking = {"output_type": "generate_until", "generation_kwargs": until, "metric_list": exact, "filter_list": clean}
    _write_task(folder, ANSWERS, questions, asking)
    _write_task(folder, LIKELIHOOD, likelihoods, {"output_type": "loglikelihood"})


def text_of(tokenizer: object, ids: list[int]) -> str:
    """Return the text of ``ids``. Raises DataError if it would be read as others."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if tokenizer(text, add_special_tokens=False).input_ids != ids:
        raise DataError(f"no text gives the ids of {text[:60]!r}, so lm_eval cannot be asked for them")
    return text


def _write_task(folder: Path, name: str, rows: Iterable[dict], how: dict) -> None:
    file = (folder / f"{name}.jsonl").absolute()
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    texts = {"doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}", "target_delimiter": ""}
    write_json(folder / f"{name}.yaml", {"task": name, **data, **texts, **how})  # all JSON is YAML, too


def measure(python: str, model: Path, out: Path, name: str) -> Side:
    """Return what lm_eval says of the folder ``model``; what it writes lies under ``out``/``name``."""
    folder = (out / name).absolute()
    where = f"pretrained={model.absolute()},dtype=float32,add_bos_token=False"
    command = [python, "-m", "lm_eval", "run", "--model", "hf", "--model_args", where, "--tasks", ANSWERS, LIKELIHOOD]
    command += ["--include_path", str(out / "tasks"), "--device", "cpu", "--output_path", str(folder), "--log_samples"]
    # Nothing is fetched: model, rows and tasks are all here.
    found = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    if found.returncode:
        raise MachineError(f"lm_eval ended with status {found.returncode} on {model}; what it said stands above")
    return read_side(folder)


def read_side(folder: Path) -> Side:
    """Return the newest figures that lm_eval has written under ``folder``."""
    results = json.loads(_newest(folder, "results_*.json").read_text(encoding="utf-8"))
    scored = results["results"][ANSWERS]
    asked = results["n-samples"][ANSWERS]["effective"]
    told = [json.loads(line) for line in _newest(folder, f"samples_{LIKELIHOOD}_*.jsonl").read_text(encoding="utf-8").splitlines()]
    total = sum(each["doc"]["sign"] * float(each["filtered_resps"][0][0]) for each in told)
    return Side(round(scored["exact_match,stripped"] * asked), -total / sum(each["doc"]["tokens"] for each in told))


def _newest(folder: Path, pattern: str) -> Path:
    return max(folder.rglob(pattern), key=lambda path: path.stat().st_mtime)


def _side(side: object, questions: int) -> Side:
    return Side(round(side.scores["exact_match"].value * questions), side.scores["loss"].value)


def print_table(ours: list[Side], theirs: list[Side], rows: int) -> None:
    """Print both programs' figures. Raises ExportError if they do not agree."""
    print(f"\n| {rows} held-out rows | before: exact, loss | after: exact, loss |\n|---|---|---|")
    for name, sides in (("qlite.evaluate, on the run", ours), ("lm_eval, on the folders", theirs)):
        print(f"| {name} | {' | '.join(f'{side.exact} of {rows}, {side.loss:.4f}' for side in sides)} |")
    wrong = [when for when, a, b in zip(("before", "after"), ours, theirs, strict=True) if not a.agrees(b, rows)]
    if wrong:
        raise ExportError(f"they do not agree on what was {' and '.join(wrong)}")
    print("they agree")


if __name__ == "__main__":
    run_verb(main)
