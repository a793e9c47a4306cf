"""python -m qlite.evaluate: figures against hand computations, the base's against a run opened without adapter, and what is refused."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlite import evaluate, export
from qlite.errors import DataError, MachineError, RecipeError, RunError
from qlite.evaluate import Examination, Material
from qlite.serving import answer, likelihood
from qlite.serving.answer import Sampling
from qlite.serving.metrics import METRICS, Score
from qlite.training.comparison import KIND, Comparison, Side, print_comparison, shown
from qlite.training.open_run import OpenRun, open_run
from qlite.training.run_folder import RunFolder
from tests.tiny_run import Watcher, run, tiny_recipe

ALL = ["loss", *METRICS, "accuracy"]
SEVERAL = [("ab", "one two three four"), ("cd", "five"), ("ab", "six seven"), ("ab", "eight")]
CHOICES = [
    {"question": "abc", "choices": ["fe", "cba", "abcabc"], "answer": 1},
    {"question": "fed", "choices": ["def", "fff"], "answer": "A"},
    {"question": "bad", "choices": ["b", "dab"], "answer": "dab"},
]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(rows: list[tuple[str, str]]) -> list[dict]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run whose adapter changes what the base says; the head is adapted, too."""
    folder = tmp_path_factory.mktemp("evaluate")
    run(tiny_recipe(folder, train={"steps": 20}, optimizer={"lr": 2e-2}, method={"targets": ["q_proj", "down_proj", "lm_head"]}))
    return folder / "run"


def open_float(path: Path, with_adapter: bool = True) -> OpenRun:
    """Return the run with its weights in float32, where batches differ by nothing that shows."""
    opened = open_run(RunFolder(path), "cpu", lambda *_: None)
    if with_adapter:
        opened.attach()
    for module in opened.base.model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    opened.base.model.float()
    return opened


def examine(opened: OpenRun, data: str, metrics: list[str], format: str | None = None) -> Examination:
    talks = evaluate.read_given(opened.recipe.data, data, format, None, Watcher())
    return Examination(opened, Material.of(talks, opened), metrics, Sampling(6), Watcher())


def evaluated(finished: Path, out: Path, *arguments: str) -> dict:
    evaluate.main([str(finished), "--device", "cpu", "--out", str(out), *arguments])
    return json.loads(out.read_text())


def plain_losses(opened: OpenRun, texts: list[tuple[list[int], int]]) -> list[list[float]]:
    """Return -log p of each id from index ``start`` on, from all logits of one row at a time."""
    losses = []
    for ids, start in texts:
        with torch.no_grad():
            logs = opened.base.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses.append([-logs[place - 1, ids[place]].item() for place in range(start, len(ids))])
    return losses


def test_loss_and_perplexity_are_those_of_a_plain_softmax_over_the_answers(finished, tmp_path):
    opened = open_float(finished)
    side = examine(opened, write_rows(tmp_path / "rows.jsonl", pairs(SEVERAL)), ["loss"]).measure("adapter")
    prompts = [opened.encoder.encode_prompt([{"role": "user", "content": prompt}]) for prompt, _ in SEVERAL]
    # The tiny tokenizer has one token a character; <|im_end|>, id 3, ends the answer.
    texts = [
        (prompt + opened.encoder.tokenizer(answer)["input_ids"] + [3], len(prompt))
        for prompt, (_, answer) in zip(prompts, SEVERAL, strict=True)
    ]
    each = [value for losses in plain_losses(opened, texts) for value in losses]
    assert len(each) == sum(len(answer) + 1 for _, answer in SEVERAL)
    assert side.scores["loss"].value == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert side.scores["perplexity"].value == pytest.approx(math.exp(sum(each) / len(each)), rel=1e-4)
    assert f"{len(each)} tokens" in side.scores["loss"].signature


def test_the_base_column_is_a_run_opened_without_its_adapter(finished, tmp_path):
    data = write_rows(tmp_path / "choices.jsonl", CHOICES)
    with_adapter, without = open_run(RunFolder(finished), "cpu", lambda *_: None), open_run(RunFolder(finished), "cpu", lambda *_: None)
    with_adapter.attach()
    examination = examine(with_adapter, data, ALL, "choice")
    base, adapter, plain = examination.of_base(), examination.measure("adapter"), examine(without, data, ALL, "choice").measure("plain")
    assert base.scores == plain.scores
    assert base.answers == plain.answers
    assert base.likelihoods == plain.likelihoods
    assert adapter.scores["loss"].value < base.scores["loss"].value - 0.1
    assert adapter.likelihoods != base.likelihoods
    again = examination.measure("adapter")  # the adapter is on again
    assert again.scores == adapter.scores


def test_the_figures_written_are_those_of_the_answers_written(finished, tmp_path):
    record = evaluated(finished, tmp_path / "out.json", "--max-tokens", "8")
    assert record["kind"] == KIND
    assert record["counts"] == {"rows": 7, "trained_tokens": record["counts"]["trained_tokens"], "questions": 7, "references": 7} | {
        "questions_with_choices": 0
    }
    references = [row["references"] for row in record["answers"]]
    for name, metric in METRICS.items():
        for side in ("base", "adapter"):
            assert record["metrics"][name][side] == metric([row[side] for row in record["answers"]], references).value
    for values in record["metrics"].values():
        assert values["difference"] == values["adapter"] - values["base"]
        assert values["signature"]
    assert record["versions"]["sacrebleu"]
    assert set(record["seconds"]) == {"base", "adapter"}
    assert record["choices"] == []


def test_the_held_out_rows_are_the_runs_own_and_the_loss_is_what_training_said(finished, tmp_path):
    record = evaluated(finished, tmp_path / "out.json", "--metrics", "loss,exact_match", "--max-tokens", "4")
    said = [r for r in RunFolder(finished).records.read() if r["kind"] == "eval"][-1]
    assert record["metrics"]["loss"]["adapter"] == pytest.approx(said["loss"], rel=1e-3)
    assert record["counts"]["trained_tokens"] == said["trained_tokens"]
    words = [json.loads(line)["prompt"] for line in (finished.parent / "test.jsonl").read_text().splitlines()]
    assert sorted(row["messages"][-1]["content"] for row in record["answers"]) == sorted(words)
    assert all(row["references"] == [row["messages"][-1]["content"][::-1]] for row in record["answers"])
    assert all(row["where"].startswith("test.jsonl line ") for row in record["answers"])


def test_rows_taken_off_the_training_file_are_found_again_as_text(tmp_path):
    recipe = tiny_recipe(tmp_path, train={"steps": 2}, data={"test": None, "held_out_rows": 5, "system": "Backwards."})
    run(recipe)
    record = evaluated(tmp_path / "run", tmp_path / "out.json", "--metrics", "loss,chrf", "--no-base")
    assert record["counts"]["rows"] == record["counts"]["questions"] == 5
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    for row in record["answers"]:
        asked = json.loads(lines[int(row["where"].removeprefix("train.jsonl line ")) - 1])
        assert row["messages"] == [{"role": "system", "content": "Backwards."}, {"role": "user", "content": asked["prompt"]}]
        assert row["references"] == [asked["completion"]]
        assert "base" not in row
    assert "difference" not in record["metrics"]["loss"]


def test_held_out_rows_that_may_have_been_trained_on_are_spoken_of(tmp_path, capsys):
    run(tiny_recipe(tmp_path, train={"steps": 2}, data={"test": None, "held_out_rows": 5}))
    evaluated(tmp_path / "run", tmp_path / "out.json", "--metrics", "loss", "--no-base")
    assert "may have been trained on" not in capsys.readouterr().out
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "fade", "completion": "edaf"}) + "\n")
    evaluated(tmp_path / "run", tmp_path / "out.json", "--metrics", "loss", "--no-base")
    assert "may have been trained on" in capsys.readouterr().out
    export.main(["--merge", str(tmp_path / "run"), "--device", "cpu"])
    assert "may have been trained on" in capsys.readouterr().out


def test_the_template_of_the_training_measures_wherever_its_file_has_gone(tmp_path):
    jinja = tmp_path / "my.jinja"
    jinja.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    run(tiny_recipe(tmp_path, data={"template": str(jinja)}, train={"steps": 2}))
    before = evaluated(tmp_path / "run", tmp_path / "a.json", "--metrics", "loss")
    jinja.write_text("{% for m in messages %}{{ m.role }}? {{ m.content }}<eos>{% endfor %}")
    assert evaluated(tmp_path / "run", tmp_path / "b.json", "--metrics", "loss")["metrics"] == before["metrics"]
    jinja.unlink()
    assert evaluated(tmp_path / "run", tmp_path / "c.json", "--metrics", "loss")["metrics"] == before["metrics"]


def test_rows_that_do_not_fit_are_left_out_and_said(tmp_path, capsys):
    run(tiny_recipe(tmp_path, data={"bad_rows": "skip"}, train={"steps": 2}))
    path = write_rows(tmp_path / "t.jsonl", [*pairs([("ab", "ba")]), {"prompt": "x", "completion": 3}, {"prompt": "y"}])
    evaluated(tmp_path / "run", tmp_path / "out.json", "--data", path, "--metrics", "loss")
    assert "--data: 2 rows do not fit their format and are left out, first --data: t.jsonl line 2" in " ".join(
        capsys.readouterr().out.split()
    )


def test_rows_with_one_prompt_are_one_question_asked_once(finished, tmp_path, monkeypatch):
    asked = []
    plain = evaluate.answer_all
    monkeypatch.setattr(
        evaluate, "answer_all", lambda model, encoder, prompts, *rest: asked.append(prompts) or plain(model, encoder, prompts, *rest)
    )
    data = write_rows(tmp_path / "rows.jsonl", pairs(SEVERAL))
    record = evaluated(finished, tmp_path / "out.json", "--data", data, "--max-tokens", "4")
    assert [len(prompts) for prompts in asked] == [2, 2]
    assert [(row["where"], row["references"]) for row in record["answers"]] == [
        ("rows.jsonl line 1", ["one two three four", "six seven", "eight"]),
        ("rows.jsonl line 2", ["five"]),
    ]
    assert record["counts"]["rows"] == record["counts"]["references"] == 4
    assert record["metrics"]["bleu"]["signature"].startswith("nrefs:var")


def test_a_conversation_is_asked_up_to_its_last_answer(finished, tmp_path):
    turns = [("user", "ab"), ("assistant", "ba"), ("user", "cd"), ("assistant", "dc")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    rows[0]["messages"][-1]["weight"] = 0  # not to be learnt, but to be asked all the same
    record = evaluated(finished, tmp_path / "out.json", "--data", write_rows(tmp_path / "rows.jsonl", rows), "--metrics", "exact_match")
    (row,) = record["answers"]
    assert [message["content"] for message in row["messages"]] == ["ab", "ba", "cd"]
    assert row["references"] == ["dc"]


def test_choices_are_weighed_as_a_plain_softmax_weighs_them(finished, tmp_path):
    opened = open_float(finished)
    side = examine(opened, write_rows(tmp_path / "choices.jsonl", CHOICES), ["accuracy"], "choice").measure("adapter")
    right, by_sum, by_character = [1, 0, 1], 0, 0
    for index, row in enumerate(CHOICES):
        prompt = opened.encoder.encode_prompt([{"role": "user", "content": row["question"]}])
        texts = [(prompt + opened.encoder.tokenizer(choice)["input_ids"], len(prompt)) for choice in row["choices"]]
        sums = [-sum(losses) for losses in plain_losses(opened, texts)]
        means = [value / len(choice) for value, choice in zip(sums, row["choices"], strict=True)]
        assert side.likelihoods[index] == pytest.approx(sums, rel=1e-5)
        by_sum += sums.index(max(sums)) == right[index]
        by_character += means.index(max(means)) == right[index]
    assert side.scores["accuracy"].value == by_sum / 3
    assert side.scores["accuracy_per_character"].value == by_character / 3


def test_choices_are_kept_in_the_file_with_what_was_asked(finished, tmp_path):
    data = write_rows(tmp_path / "choices.jsonl", CHOICES)
    record = evaluated(finished, tmp_path / "out.json", "--data", data, "--metrics", "accuracy,exact_match")
    assert [row["choices"] for row in record["choices"]] == [row["choices"] for row in CHOICES]
    assert [row["right"] for row in record["choices"]] == [1, 0, 1]
    assert [len(row["log_likelihoods"]["base"]) for row in record["choices"]] == [3, 2, 2]
    assert [row["references"] for row in record["answers"]] == [["cba"], ["def"], ["dab"]]
    assert set(record["metrics"]) == {"exact_match", "accuracy", "accuracy_per_character"}


@pytest.mark.parametrize(("micro_batch", "answer_tokens", "likelihood_tokens"), [(1, 1, 1), (3, 60, 40), (50, 10**6, 10**6)])
def test_in_float32_every_split_into_batches_gives_the_same(finished, tmp_path, monkeypatch, micro_batch, answer_tokens, likelihood_tokens):
    opened, data = open_float(finished), write_rows(tmp_path / "choices.jsonl", CHOICES)
    whole = examine(opened, data, ALL, "choice").measure("adapter")
    monkeypatch.setattr(answer, "TOKENS_AT_ONCE", answer_tokens)
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", likelihood_tokens)
    recipe = replace(opened.recipe, train=replace(opened.recipe.train, micro_batch=micro_batch))
    split = examine(replace(opened, recipe=recipe), data, ALL, "choice").measure("adapter")
    assert split.answers == whole.answers
    assert split.likelihoods == [pytest.approx(values, rel=1e-5) for values in whole.likelihoods]
    assert {name: score.value for name, score in split.scores.items()} == pytest.approx(
        {n: s.value for n, s in whole.scores.items()}, rel=1e-5
    )


def test_raw_text_has_a_loss_and_asks_nothing(finished, tmp_path):
    data = write_rows(tmp_path / "texts.jsonl", [{"text": "abcdef" * 20}, {"text": "fed"}])  # 121 tokens, cut at 64; 4 tokens
    record = evaluated(finished, tmp_path / "out.json", "--data", data)
    assert set(record["metrics"]) == {"loss", "perplexity"}
    assert record["counts"]["rows"] == 3
    assert record["counts"]["trained_tokens"] == 63 + 56 + 3
    assert record["answers"] == []


def test_only_the_first_rows_are_taken(finished, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", pairs(SEVERAL))
    assert evaluated(finished, tmp_path / "out.json", "--data", data, "--rows", "2", "--metrics", "loss")["counts"]["rows"] == 2
    assert evaluated(finished, tmp_path / "own.json", "--rows", "3", "--metrics", "loss")["counts"]["rows"] == 3


def test_without_out_the_file_lies_in_the_runs_folder_and_is_replaced_by_the_next_on_the_same_data(finished, tmp_path, capsys):
    data = write_rows(tmp_path / "my rows.jsonl", pairs(SEVERAL))
    command = [str(finished), "--data", data, "--metrics", "loss", "--no-base"]
    evaluate.main(command)
    file = finished / "evaluations" / "my-rows.json"
    assert f"written to {file}" in capsys.readouterr().out
    evaluate.main([*command, "--rows", "1"])
    assert json.loads(file.read_text())["counts"]["rows"] == 1
    (tmp_path / "other").mkdir()
    other = write_rows(tmp_path / "other" / "my rows.jsonl", pairs(SEVERAL))
    with pytest.raises(RunError, match="is no evaluation of this run on .*choose another --out"):
        evaluate.main([str(finished), "--data", other, "--metrics", "loss"])


def test_the_table_the_notes_and_two_answers_are_printed_and_steer_no_terminal(finished, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", pairs([("ab\x1b[2Jc", "x"), ("cd", "y"), ("ef", "z")]))
    record = evaluated(finished, tmp_path / "out.json", "--data", data)
    out = capsys.readouterr().out
    for name in ("loss", "exact_match", "chrf"):
        values = [shown(name, record["metrics"][name][side]) for side in ("base", "adapter")]
        (line,) = [line for line in out.splitlines() if line.strip().startswith(name)]
        assert line.split()[1:] == " ".join([*values, shown(name, record["metrics"][name]["difference"], signed=True)]).split()
    assert "bleu (base, adapter): no answer has 4 words" in out
    assert "\x1b" not in out
    assert "> abc\n  expected  x\n  base      " in out
    assert out.count("\n> ") == 2


@pytest.mark.parametrize("columns", ["20", "40", "200"])
def test_no_figure_is_cut_off_on_a_narrow_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    sides = [Side(scores={"loss": metric_score(value)}) for value in (1.2345, 23456.7891)]
    print_comparison(Comparison({"rows": 1}, {"data": "rows.jsonl"}, [], [], sides[1], sides[0]))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= int(columns)
    digits = "".join(out.split("\n\n")[0].replace(" ", "").split())
    assert "…" not in digits
    if columns == "200":
        assert "23456.7891" in out


def metric_score(value: float) -> Score:
    return Score(value, "by hand")


def test_what_is_not_finite_is_null_in_the_file_and_named_in_the_table(capsys):
    side = Side(scores={"loss": metric_score(math.nan), "perplexity": metric_score(math.inf)})
    comparison = Comparison({"rows": 1}, {"data": "rows.jsonl"}, [], [], side)
    assert json.loads(json.dumps(comparison.as_record(), allow_nan=False))["metrics"]["loss"]["adapter"] is None
    print_comparison(comparison)
    assert "nan" in capsys.readouterr().out


def test_a_metric_whose_library_is_missing_is_left_out_and_the_table_says_why(finished, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else found(name))
    record = evaluated(finished, tmp_path / "out.json", "--rows", "2")
    assert set(record["metrics"]) == {"loss", "perplexity", "exact_match", "rouge_l"}
    assert set(record["left_out"]) == {"bleu", "chrf"}
    assert "bleu: left out; needs sacrebleu, which is not installed: pip install -e '.[evaluate]'" in capsys.readouterr().out.replace(
        "\n", " "
    )
    with pytest.raises(MachineError, match=r"metric bleu: needs sacrebleu.*pip install"):
        evaluate.main([str(finished), "--metrics", "loss,bleu"])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--metrics", "blue"], RecipeError, 'no metric "blue"; did you mean "bleu"'),
        (["--metrics", ","], RecipeError, "names none"),
        (["--rows", "0"], RecipeError, "--rows 0: should be 1 or more"),
        (["--max-tokens", "0"], RecipeError, "max tokens 0"),
        (["--data", "nowhere.jsonl"], DataError, "--data: .*nowhere.jsonl"),
        (["--metrics", "accuracy"], DataError, "--metrics accuracy: no row has choices"),
        (["--max-tokens", "2048"], DataError, "test.jsonl line 1: its prompt has .* lower --max-tokens"),
        (["--out", "figures.txt"], RunError, "is a .json file"),
    ],
)
def test_what_makes_no_sense_is_refused(finished, tmp_path, monkeypatch, arguments, error, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(finished.rglob("*"))
    with pytest.raises(error, match=words):
        evaluate.main([str(finished), *arguments])
    assert sorted(finished.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "arguments", "words"),
    [
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 5}], [], 'rows.jsonl line 2: field "completion" is .*not text'),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "c" * 3000, "completion": "b"}],
            [],
            "rows.jsonl line 2: has 30.. tokens, and .* 2048",
        ),
        ([{"text": "abc"}], ["--metrics", "bleu"], "--metrics bleu: the rows are raw text"),
        ([{"question": "a", "choices": ["x", ""], "answer": 0}], ["--format", "choice"], "rows.jsonl line 1: choice 2 is empty"),
        ([{"question": "a", "choices": ["x", "c" * 3000], "answer": 0}], ["--metrics", "accuracy"], "rows.jsonl line 1: has 30.. tokens"),
        ([{"messages": [{"role": "user", "content": "a"}]}], [], "rows.jsonl line 1: the assistant says nothing"),
    ],
)
def test_rows_that_cannot_be_measured_with_are_named_with_file_and_line(finished, tmp_path, rows, arguments, words):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=words):
        evaluate.main([str(finished), "--data", data, "--out", str(tmp_path / "out.json"), *arguments])
    assert not (tmp_path / "out.json").exists()


def test_a_file_that_is_no_evaluation_is_never_overwritten(finished, tmp_path):
    mine = tmp_path / "rows.json"
    mine.write_text("[1, 2]")
    with pytest.raises(RunError, match="exists and is no evaluation of this run on held-out"):
        evaluate.main([str(finished), "--out", str(mine)])
    assert mine.read_text() == "[1, 2]"
    evaluated(finished, tmp_path / "out.json", "--metrics", "loss", "--no-base")
    (tmp_path / "other").symlink_to(finished)
    with pytest.raises(RunError, match="is no evaluation of this run"):
        evaluate.main([str(tmp_path / "other"), "--out", str(tmp_path / "out.json")])
    assert evaluated(finished, tmp_path / "out.json", "--metrics", "loss")["metrics"]["loss"]["base"]


def test_a_run_without_held_out_rows_asks_for_some(tmp_path):
    nothing_held_out = {"exact_match_rows": 0, "eval_every": 0, "steps": 2}
    run(tiny_recipe(tmp_path, data={"test": None}, train=nothing_held_out))
    with pytest.raises(DataError, match="held out no rows .*--data FILE"):
        evaluate.main([str(tmp_path / "run")])
