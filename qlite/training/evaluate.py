"""What a run measures on its held-out rows: loss and perplexity, and the model's own answers."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from transformers import PreTrainedModel

from qlite.data.batches import batches_of
from qlite.data.dataset import DataSet
from qlite.data.encode import Encoded
from qlite.errors import DataError
from qlite.recipe.schema import Train
from qlite.serving.answer import Sampling, answer_all
from qlite.training.report import AnswerReport, EvalReport, Observer, SampleReport
from qlite.training.step import Stepper

SAMPLES = 2


def evaluate(stepper: Stepper, data: DataSet, train: Train, step: int, observer: Observer) -> EvalReport:
    """Return loss and perplexity over all held-out rows. Padding is kept small by length order, the longest first."""
    start = time.perf_counter()
    rows = [data.test[index] for index in range(len(data.test))]
    told = partial(observer.phase, "evaluate")
    loss, tokens = mean_loss(stepper, rows, train.micro_batch, data.encoder.pad_id, told)
    return EvalReport(step, loss, perplexity(loss), len(rows), tokens, time.perf_counter() - start)


def mean_loss(
    stepper: Stepper, rows: Sequence[Encoded], micro_batch: int, pad_id: int, told: Callable[[int, int], None]
) -> tuple[float, int]:
    """Return the mean loss over the trained tokens of ``rows``, in nats, and how many there are. ``told``: (batches done, of all).

    Padding is kept small by length order; the longest come first, so that memory trouble shows at once.
    """
    rows = sorted(rows, key=len, reverse=True)
    total, loss, tokens = -(-len(rows) // micro_batch), 0.0, 0
    told(0, total)
    for number, batch in enumerate(batches_of(rows, micro_batch, pad_id), start=1):
        loss += stepper.evaluate([batch]) * batch.trained_tokens
        tokens += batch.trained_tokens
        told(number, total)
    return loss / max(1, tokens), tokens


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats; beyond what a float holds, the largest power below."""
    return math.exp(min(loss, 700.0))


def require_answers(data: DataSet, train: Train) -> None:
    """Raise DataError if answers are to be compared and the held-out rows are raw text, which has none."""
    if train.exact_match_rows and not data.test.store.answer[data.test.row].all():
        raise DataError(f"train.exact_match_rows = {train.exact_match_rows}: held-out rows of raw text have no answer; remove it")


def compare_answers(model: PreTrainedModel, data: DataSet, train: Train, step: int, observer: Observer) -> AnswerReport:
    """Return how many held-out prompts the model answers, greedily, with exactly the expected text."""
    rows = [data.test[index] for index in range(min(train.exact_match_rows, len(data.test)))]
    prompts = [list(map(int, row.ids[: row.answer_start])) for row in rows]
    expected = [data.encoder.decode(row.ids[row.answer_start :]).strip() for row in rows]
    answers = [answer.strip() for answer in _answers(model, data, prompts, train, "answer held-out prompts", observer)]
    exact = sum(a == e for a, e in zip(answers, expected, strict=True))
    samples = [(data.question(index), expected[index], answers[index]) for index in range(min(SAMPLES, len(rows)))]
    return AnswerReport(step, len(rows), exact, samples)


def sample(model: PreTrainedModel, data: DataSet, train: Train, step: int, observer: Observer) -> SampleReport:
    """Return what the model answers, greedily, to the recipe's own prompts."""
    answers = _answers(model, data, sample_prompts(data, train), train, "answer samples", observer)
    return SampleReport(step, list(zip(train.samples, answers, strict=True)))


def sample_prompts(data: DataSet, train: Train) -> list[list[int]]:
    """Return the recipe's own prompts as token ids."""
    system = [{"role": "system", "content": data.system}] if data.system else []
    return [data.encoder.encode_prompt([*system, {"role": "user", "content": text}], "train.samples") for text in train.samples]


def _answers(model: PreTrainedModel, data: DataSet, prompts: list[list[int]], train: Train, phase: str, observer: Observer) -> list[str]:
    observer.phase(phase, 0, len(prompts))
    told = partial(_tell, observer, phase, len(prompts))
    return answer_all(model, data.encoder, prompts, Sampling(max_tokens=train.answer_tokens), told, observer.note)


def _tell(observer: Observer, phase: str, total: int, done: int) -> None:
    observer.phase(phase, done, total)
