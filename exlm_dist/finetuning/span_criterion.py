"""Answers that are parts of a text: what is learned of them, and how predictions for windows become answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from exlm_dist.config.schema import ModelConfig
from exlm_dist.finetuning.answer_metrics import answer_scores, best_threshold
from exlm_dist.finetuning.dataset import Examples
from exlm_dist.finetuning.finetune_settings import TrainingSettings
from exlm_dist.finetuning.property_model import PropertyModel
from exlm_dist.finetuning.span_model import build_span_model
from exlm_dist.model.build import LanguageModel

#: Most tokens of an answer.
MOST_TOKENS = 30


class Question(NamedTuple):
    """A question as it is judged. answers: right ones, none if it has no answer."""

    context: str
    answers: tuple[str, ...]


class Predicted(NamedTuple):
    """answers: the best part of the context for each question. odds: score of no answer minus that of this answer, [n];
    above 0 where the model says that there is none."""

    answers: list[str]
    odds: np.ndarray


@dataclass(frozen=True)
class SpanCriterion:
    """See `Criterion`. A label is the first and the last token of the answer in a window, float64 [m, 2], 0 and 0 (BOS)
    where the window has none; `Examples.ids` are numbers of windows.

    Args:
        question_of: of each window, [w]. shift: number in the context of a window's token i is i + shift, [w].
        spans: of each question, the first character of each token of its context and the one behind its last, [n, 2].
        unanswerable: whether a question may have no answer; if not, one is always given.
    """

    questions: Sequence[Question]
    question_of: np.ndarray
    shift: np.ndarray
    spans: Sequence[np.ndarray]
    unanswerable: bool
    width: int = 4
    pooled: bool = False

    def model(self, body: LanguageModel, config: ModelConfig, settings: TrainingSettings, seed: int) -> PropertyModel:
        """See `build_span_model`."""
        return build_span_model(body, config, seed=seed, dropout=settings.dropout, frozen=settings.frozen)

    def weights(self, labels: np.ndarray, settings: TrainingSettings) -> np.ndarray:
        """1 for each end of each answer."""
        return np.ones_like(labels)

    def loss(self, outputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Cross-entropy of the first and of the last token among all that can be one; outputs [B, 2, L]."""
        losses = F.cross_entropy(outputs.flatten(0, 1), labels.long().flatten(), reduction="none")
        return (losses * weights.flatten().to(losses.dtype)).sum()

    def predict(self, outputs: Tensor) -> Tensor:
        """Of each window: score of no answer, of the best answer of at most `MOST_TOKENS` tokens, and the first and the
        last token of that, [B, 4]. A score is the sum of those of the two tokens."""
        starts, ends = outputs.double().unbind(1)
        none = starts[:, 0] + ends[:, 0]
        starts = starts.index_fill(1, torch.tensor([0], device=starts.device), -torch.inf)
        best, first, last = torch.full_like(none, -torch.inf), torch.zeros_like(none), torch.zeros_like(none)
        for more in range(min(MOST_TOKENS, starts.shape[1])):
            scores, places = (starts[:, : starts.shape[1] - more] + ends[:, more:]).max(1)
            higher = scores > best
            best, first = torch.where(higher, scores, best), torch.where(higher, places.double(), first)
            last = torch.where(higher, places.double() + more, last)
        return torch.stack([none, best, first, last], 1)

    def answers(self, values: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, Predicted]:
        """(numbers of the questions, what is predicted for them) from the predictions for `windows`, [m, 4]: of several
        windows the best answer, and the lowest score of none."""
        numbers, place = np.unique(self.question_of[windows], return_inverse=True)
        none, best = np.full(len(numbers), np.inf), np.full(len(numbers), -np.inf)
        np.minimum.at(none, place, values[:, 0])
        np.maximum.at(best, place, values[:, 1])
        chosen = np.zeros(len(numbers), np.int64)
        is_best = np.flatnonzero(values[:, 1] == best[place])[::-1]
        chosen[place[is_best]] = is_best  # of equally good windows the first
        texts = []
        for number, row in zip(numbers, chosen):
            first, last = values[row, 2:].astype(int) + self.shift[windows[row]]
            spans = self.spans[number]
            texts.append(self.questions[number].context[spans[first, 0] : spans[last, 1]])
        return numbers, Predicted(texts, none - best)

    def score(self, values: np.ndarray, examples: Examples) -> dict[str, float]:
        """EM and F1 of the questions of these windows: where no answer is said to be one if its score is the higher
        (`em`, `f1`), and at the best threshold (`best_em`, `best_f1`). Also of the questions with and without an answer
        alone, NaN where there is none."""
        assert examples.ids is not None
        numbers, predicted = self.answers(values, examples.ids)
        own = [self.questions[number] for number in numbers]
        pairs = zip(predicted.answers, own)
        given = np.array([answer_scores(text, question.answers) for text, question in pairs])  # [n, (em, f1)]
        answerable = np.array([bool(question.answers) for question in own])
        said = predicted.odds <= 0 if self.unanswerable else np.ones(len(own), bool)
        scores = np.where(said[:, None], given, ~answerable[:, None])
        best = [
            best_threshold(column, answerable, predicted.odds)[0] if self.unanswerable else float(column.mean())
            for column in given.T
        ]
        return {
            "em": float(scores[:, 0].mean()),
            "f1": float(scores[:, 1].mean()),
            "best_em": best[0],
            "best_f1": best[1],
            "answerable_em": _mean(scores[answerable, 0]),
            "answerable_f1": _mean(scores[answerable, 1]),
            "unanswerable_em": _mean(scores[~answerable, 0]),
            "skipped": 0.0,
        }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
