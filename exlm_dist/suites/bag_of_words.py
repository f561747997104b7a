"""What a model without any pretraining reaches on texts: a linear model on weighted counts of their words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from exlm_dist.finetuning.splits import Parts
from exlm_dist.finetuning.targets import Target

#: Words and pairs of neighbouring words that are counted, at most: the most frequent ones.
MOST_WORDS = 100_000
#: Inverse strength of the penalty of the logistic regression, and that of the ridge regression.
C, ALPHA = 1.0, 1.0
ITERATIONS = 1000


def predict_from_words(
    kind: str,
    texts: Sequence[list[str]],
    labels: np.ndarray,
    targets: Sequence[Target],
    parts: Parts,
    *,
    seed: int,
    threads: int,
) -> dict[str, np.ndarray]:
    """Train on the part 'train' and predict the others, float64 [rows, outputs] as of `losses.predicted_values`:
    logistic regression, or ridge regression of values, on TF-IDF of words and pairs of words.

    texts: of one column or of two, each [n]; labels [n, 1]. Of two columns the features are those of either text, how
    they differ, what they have in common, and their cosine. Nothing is chosen, and nothing depends on the seed.
    """
    (target,), train = targets, parts["train"]
    features = _features(texts, train)
    model = _model(target).fit(features[train], labels[train, 0])
    return {part: _predict(model, target, features[rows]) for part, rows in parts.items() if part != "train"}


def _features(texts: Sequence[list[str]], train: np.ndarray) -> Any:
    """Sparse [n, F]; words and their weights are those of the training rows."""
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=MOST_WORDS, token_pattern=r"\S+")
    words.fit([column[row] for column in texts for row in train])
    sides = [words.transform(column) for column in texts]
    if len(sides) == 1:
        return sides[0]
    first, second = sides
    common = first.multiply(second).tocsr()
    return sparse.hstack([first, second, abs(first - second), common, sparse.csr_matrix(common.sum(axis=1))]).tocsr()


def _model(target: Target) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge

    return Ridge(ALPHA) if target.kind == "regression" else LogisticRegression(C=C, max_iter=ITERATIONS)


def _predict(model: Any, target: Target, features: Any) -> np.ndarray:
    if target.kind == "regression":
        return model.predict(features)[:, None]
    known = model.predict_proba(features)
    assert target.classes is not None
    probabilities = np.zeros((len(known), len(target.classes)))
    probabilities[:, model.classes_.astype(int)] = known
    return probabilities[:, 1:] if target.kind == "binary" else probabilities
