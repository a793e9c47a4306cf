"""How far answers are from what was expected: exact match, ROUGE-L, BLEU and chrF over several references a question.

All take ``predictions`` [N] and, for each, the list of its references, one or more. ROUGE and the corpus scores are their
reference implementations' own numbers (rouge-score, sacrebleu), so that they can be compared with published ones.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import zip_longest

from qlite.errors import MachineError, install_line

INSTALL = install_line("evaluate")
References = list[list[str]]


@dataclass(frozen=True)
class Score:
    """One metric's ``value`` and the ``signature`` that says how it was computed, so that another can be compared with it."""

    value: float
    signature: str
    warning: str = ""
    """Why the value says little about these texts; empty: nothing is known against it."""


def exact_match(predictions: list[str], references: References) -> Score:
    """Return the share of predictions, 0 to 1, equal to one of their references letter by letter; space at both ends is dropped."""
    equal = [said.strip() in {reference.strip() for reference in wanted} for said, wanted in _pairs(predictions, references)]
    return Score(sum(equal) / len(equal), "letter by letter|space at the ends dropped")


def rouge_l(predictions: list[str], references: References) -> Score:
    """Return the mean F-measure of ROUGE-L, 0 to 1, each prediction against its best reference.

    Lin 2004, "ROUGE: a package for automatic evaluation of summaries", section 3 (there with several references: the best).
    Words are runs of a-z and 0-9 after lowering, not stemmed: of a text in another script nothing is left, and the score is 0.

    Raises:
        MachineError: rouge-score is not installed.
    """
    require("rouge_l")
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = DefaultTokenizer(use_stemmer=False)
    scorer = RougeScorer(["rougeL"], tokenizer=tokenizer)
    best = [scorer.score_multi(wanted, said)["rougeL"].fmeasure for said, wanted in _pairs(predictions, references)]
    every = [reference for wanted in references for reference in wanted]
    wordless = sum(not tokenizer.tokenize(reference) for reference in every)
    warning = f"{wordless} of {len(every)} references have no word of a-z and 0-9, all that ROUGE reads" if wordless else ""
    return Score(sum(best) / len(best), f"F-measure|best reference|stemmer:no|version:{version('rouge-score')}", warning)


def bleu(predictions: list[str], references: References) -> Score:
    """Return corpus BLEU, 0 to 100, of up to 4 words: sacrebleu's defaults (case counts, tokenizer 13a, exponential smoothing).

    Papineni et al. 2002, section 2; Post 2018, arXiv:1804.08771, for the signature.

    Raises:
        MachineError: sacrebleu is not installed.
    """
    require("bleu")
    from sacrebleu.metrics import BLEU

    metric = BLEU(force=True)  # force: silences advice on texts that are tokenised already; the score is the same
    score = metric.corpus_score(predictions, _streams(predictions, references))
    warning = "" if score.totals[-1] else "no answer has 4 words: BLEU is 0 whatever they say"
    return Score(score.score, str(metric.get_signature()), warning)


def chrf(predictions: list[str], references: References) -> Score:
    """Return corpus chrF2, 0 to 100, of up to 6 characters: sacrebleu's defaults. Reads any script.

    Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation".

    Raises:
        MachineError: sacrebleu is not installed.
    """
    require("chrf")
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    score = metric.corpus_score(predictions, _streams(predictions, references))
    return Score(score.score, str(metric.get_signature()))


# Name on the command line -> how it is computed, and the library (as it is imported, as pip calls it) that does.
METRICS: dict[str, Callable[[list[str], References], Score]] = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
    "bleu": bleu,
    "chrf": chrf,
}
LIBRARIES = {"rouge_l": ("rouge_score", "rouge-score"), "bleu": ("sacrebleu", "sacrebleu"), "chrf": ("sacrebleu", "sacrebleu")}


def missing_library(metric: str) -> str | None:
    """Return the name of the library that ``metric`` needs and that is not installed, or None."""
    module, package = LIBRARIES.get(metric, (None, None))
    return package if module and importlib.util.find_spec(module) is None else None


def require(metric: str) -> None:
    """Raise MachineError, with the line to type, if what ``metric`` needs is not installed."""
    missing = missing_library(metric)
    if missing:
        raise MachineError(f"metric {metric}: needs {missing}, which is not installed; {INSTALL}")


def _streams(predictions: list[str], references: References) -> list[list[str | None]]:
    """Return every prediction's first reference, then every one's second ..., as sacrebleu takes them; None where there is none."""
    return [list(stream) for stream in zip_longest(*(wanted for _, wanted in _pairs(predictions, references)))]


def _pairs(predictions: list[str], references: References) -> list[tuple[str, list[str]]]:
    assert predictions, "a score over no prediction is none"
    assert all(references), "every prediction needs a reference"
    return list(zip(predictions, references, strict=True))
