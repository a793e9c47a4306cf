"""Scores of answers against values computed by hand from the papers' formulas, and against the libraries' published examples."""

import importlib.util
import math
from collections import Counter

import pytest

from qlite.errors import MachineError
from qlite.serving import metrics
from qlite.serving.metrics import bleu, chrf, exact_match, rouge_l


def test_exact_match_counts_letters_and_drops_space_at_the_ends_only():
    found = exact_match([" Oslo\n", "oslo", "O slo", "Bergen"], [["Oslo"], ["Oslo"], ["Oslo"], ["Oslo", " Bergen "]])
    assert found.value == 2 / 4


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # Lin 2004, section 3.1: "police killed the gunman" and "police kill the gunman" share police, the, gunman: P = R = 3/4.
    assert rouge_l(["police kill the gunman"], [["police killed the gunman"]]).value == pytest.approx(3 / 4)
    # ... and of "the gunman kill police" only "the gunman" is in order: 2/4.
    assert rouge_l(["the gunman kill police"], [["police killed the gunman"]]).value == pytest.approx(2 / 4)
    # P = 2/2, R = 2/6: F = 2 P R / (P + R) = 1/2.
    assert rouge_l(["The cat!"], [["the cat sat on the mat"]]).value == pytest.approx(1 / 2)


def test_rouge_l_takes_the_best_reference_and_the_mean_over_answers():
    found = rouge_l(["the cat", "dog"], [["a horse", "the cat sat on the mat"], ["dog"]])
    assert found.value == pytest.approx((1 / 2 + 1) / 2)
    assert found.warning == ""
    assert "version:" in found.signature


def test_rouge_l_says_that_it_reads_no_other_script():
    found = rouge_l(["мир", "peace"], [["мир"], ["peace"]])
    assert found.value == 1 / 2
    assert found.warning.startswith("1 of 2 references have no word of a-z")


def ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def papineni(predictions: list[str], references: list[list[str]]) -> float:
    """Return BLEU as in Papineni et al. 2002, sections 2.1 to 2.3, over texts that are split at spaces; every order has a match."""
    precisions, said, wanted = [], 0, 0
    for n in range(1, 5):
        hits = total = 0
        for prediction, several in zip(predictions, references, strict=True):
            own = ngrams(prediction.split(), n)
            largest = Counter()
            for reference in several:
                largest |= ngrams(reference.split(), n)
            hits += sum((own & largest).values())
            total += sum(own.values())
        precisions.append(hits / total)
    for prediction, several in zip(predictions, references, strict=True):
        length = len(prediction.split())
        said += length
        wanted += min((abs(len(r.split()) - length), len(r.split())) for r in several)[1]
    penalty = 1 if said > wanted else math.exp(1 - wanted / said)
    return 100 * penalty * math.exp(sum(map(math.log, precisions)) / 4)


def test_bleu_is_papinenis_with_any_number_of_references():
    predictions = ["the cat sat on the mat today", "there is a small dog here"]
    references = [
        ["a cat sat on the mat yesterday", "the cat sat on a mat", "the cat sat on the mat"],
        ["there is a small dog outside in the rain"],
    ]
    found = bleu(predictions, references)
    assert found.value == pytest.approx(papineni(predictions, references), abs=1e-9)
    assert 0 < found.value < 100
    assert found.signature.startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_bleu_and_chrf_of_sacrebleus_own_example_are_the_published_ones():
    # README of sacrebleu, "Using SacreBLEU from Python": BLEU 48.53, chrF2 59.73.
    predictions = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    assert round(bleu(predictions, references).value, 2) == 48.53
    assert round(chrf(predictions, references).value, 2) == 59.73


def test_bleu_of_answers_shorter_than_four_words_says_that_it_is_zero():
    found = bleu(["yes", "no"], [["yes"], ["no"]])
    assert found.value == 0
    assert "no answer has 4 words" in found.warning
    assert chrf(["yes", "no"], [["yes"], ["no"]]).value == pytest.approx(100)


def test_chrf_is_the_f2_of_characters_up_to_six():
    # "abc" against "abd": 1-grams 2 of 3, 2-grams 1 of 2, 3-grams 0 of 1; no longer ones. P = R = F = (2/3 + 1/2 + 0) / 3.
    found = chrf(["abc"], [["abd"]])
    assert found.value == pytest.approx(100 * (2 / 3 + 1 / 2) / 3)
    assert found.signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    # Recall counts four times: "ab" of "abcd" has P = (1 + 1) / 2, R = (2/4 + 1/3) / 2, and F = 5 P R / (4 P + R).
    recall = (2 / 4 + 1 / 3) / 2
    assert chrf(["ab"], [["abcd"]]).value == pytest.approx(100 * 5 * recall / (4 + recall))


def test_empty_answers_are_answers():
    wanted = [["one two three four five"], ["a b c d"]]
    assert exact_match(["", ""], wanted).value == 0
    assert rouge_l(["", ""], wanted).value == 0
    assert bleu(["", ""], wanted).value == 0
    assert chrf(["", ""], wanted).value == 0


@pytest.mark.parametrize(("metric", "library"), [("rouge_l", "rouge-score"), ("bleu", "sacrebleu"), ("chrf", "sacrebleu")])
def test_a_metric_whose_library_is_missing_says_what_to_type(monkeypatch, metric, library):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == metrics.LIBRARIES[metric][0] else found(name))
    assert metrics.missing_library(metric) == library
    with pytest.raises(MachineError, match=rf"metric {metric}: needs {library}, .*pip install -e '\.\[evaluate\]'"):
        metrics.METRICS[metric](["a"], [["a"]])
    assert metrics.missing_library("exact_match") is None
