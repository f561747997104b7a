"""How answers to questions are judged: exact match and F1 of words, by the rules of SQuAD's own evaluation script
(Rajpurkar et al. 2018, arXiv 1806.03822; rajpurkar.github.io/SQuAD-explorer, evaluate-v2.0.py)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised_answer(text: str) -> str:
    """An answer without case, punctuation, articles and white space that does not count."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_scores(predicted: str, answers: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) of a predicted answer against the best of the right ones, each 0 to 1. '' is the prediction
    that there is no answer, which is right where there are none, or none with a word in it."""
    right = [text for text in map(normalised_answer, answers) if text] or [""]
    own = normalised_answer(predicted)
    return max(float(own == text) for text in right), max(_f1(own.split(), text.split()) for text in right)


def best_threshold(scores: np.ndarray, answerable: np.ndarray, odds: np.ndarray) -> tuple[float, float]:
    """(highest mean score that a threshold can reach, that threshold), where questions whose odds of having no answer
    are at most the threshold are answered, and the others are said to have none.

    scores: of the best answer to each question, [n]; answerable: bool [n]; odds: [n]. That mean is what reports call
    the best EM or F1: the threshold is chosen on the same questions.
    """
    order = np.argsort(odds, kind="stable")
    gains = (scores - ~answerable)[order]
    totals = np.concatenate([[0.0], np.cumsum(gains)]) + float((~answerable).sum())
    reachable = np.append(np.append(True, np.diff(odds[order]) > 0), True)  # equal odds are on the same side
    best = int(np.argmax(np.where(reachable, totals, -np.inf)))
    return float(totals[best] / len(scores)), -np.inf if best == 0 else float(odds[order[best - 1]])


def _f1(own: Sequence[str], right: Sequence[str]) -> float:
    """Of the words of two answers; 1 if neither has any, 0 if one has none."""
    if not own or not right:
        return float(own == right)
    common = sum((Counter(own) & Counter(right)).values())
    return 2 * common / (len(own) + len(right))
