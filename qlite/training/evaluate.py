"""What a run measures on its held-out rows: loss and perplexity, and the model's own answers."""

import math
import time
from functools import partial

from transformers import PreTrainedModel

from qlite.data.batches import batches_of
from qlite.data.dataset import DataSet
from qlite.recipe.schema import Train
from qlite.serving.answer import Sampling, answer_all
from qlite.training.report import AnswerReport, EvalReport, Observer
from qlite.training.step import Stepper, trained_tokens

SAMPLES = 2


def evaluate(stepper: Stepper, data: DataSet, train: Train, step: int, observer: Observer) -> EvalReport:
    """Return loss and perplexity over all held-out rows. Padding is kept small by length order."""
    start = time.perf_counter()
    rows = sorted(data.test, key=len)
    batches = list(batches_of(rows, train.micro_batch, data.encoder.pad_id))
    total, loss = trained_tokens(batches), 0.0
    observer.phase("evaluate", 0, len(batches))
    for number, batch in enumerate(batches, start=1):
        loss += stepper.evaluate([batch]) * trained_tokens([batch]) / total
        observer.phase("evaluate", number, len(batches))
    perplexity = math.exp(min(loss, 700.0))  # exp overflows a float beyond 709
    return EvalReport(step, loss, perplexity, len(rows), total, time.perf_counter() - start)


def compare_answers(model: PreTrainedModel, data: DataSet, train: Train, step: int, observer: Observer) -> AnswerReport:
    """Return how many held-out prompts the model answers, greedily, with exactly the expected text."""
    chosen = data.test_messages[: train.exact_match_rows]
    prompts = [messages[:-1] for messages in chosen]
    expected = [messages[-1]["content"].strip() for messages in chosen]
    phase = "answer held-out prompts"
    observer.phase(phase, 0, len(chosen))
    sampling = Sampling(max_tokens=train.answer_tokens)
    told = partial(_tell, observer, phase, len(chosen))
    answers = [answer.strip() for answer in answer_all(model, data.encoder, prompts, sampling, told)]
    exact = sum(a == e for a, e in zip(answers, expected, strict=True))
    asked = [prompt[-1]["content"] for prompt in prompts]
    return AnswerReport(step, len(chosen), exact, list(zip(asked, expected, answers, strict=True))[:SAMPLES])


def _tell(observer: Observer, phase: str, total: int, done: int) -> None:
    observer.phase(phase, done, total)
