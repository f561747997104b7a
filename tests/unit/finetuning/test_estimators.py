"""The estimators behave as scikit-learn's do, and compute what `exlm finetune` computes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from molecule_table import molecules
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score

from exlm_dist.finetuning.estimators import ExLMClassifier, ExLMRegressor
from exlm_dist.finetuning.finetune_settings import DEFAULT_TRAINING
from exlm_dist.utils.errors import ConfigError, DataError

X = molecules(40)
Y = np.array(["amine" if "N" in smiles else "other" for smiles in X])
QUICK = {"epochs": 2, "batch": 8, "lr": 0.01, "device": "cpu"}


def test_a_classifier_fits_predicts_and_scores(checkpoint: Path) -> None:
    classifier = ExLMClassifier(checkpoint, epochs=12, batch=8, lr=0.01, device="cpu").fit(X, Y)
    assert classifier.classes_.tolist() == ["amine", "other"]
    probabilities, predicted = classifier.predict_proba(X), classifier.predict(X)
    assert probabilities.shape == (40, 2) and probabilities.sum(axis=1) == pytest.approx(1)
    assert (predicted == classifier.classes_[probabilities.argmax(axis=1)]).all()
    assert classifier.score(X, Y) == (predicted == Y).mean() > 0.8
    assert (classifier.model_.predict(X) == predicted).all()
    again = ExLMClassifier(checkpoint, epochs=12, batch=8, lr=0.01, device="cpu").fit(X, Y)
    assert (again.predict_proba(X) == probabilities).all()


def test_defaults_are_those_of_the_command() -> None:
    parameters = ExLMClassifier("checkpoint").get_params()
    assert {name: parameters[name] for name in asdict(DEFAULT_TRAINING)} == asdict(DEFAULT_TRAINING)


def test_parameters_clone_and_search(checkpoint: Path) -> None:
    classifier = ExLMClassifier(checkpoint, **QUICK)
    assert clone(classifier).get_params() == classifier.get_params()
    assert clone(classifier).set_params(epochs=5).epochs == 5
    scores = cross_val_score(classifier, X, Y, cv=2)
    assert scores.shape == (2,) and ((scores >= 0) & (scores <= 1)).all()
    search = GridSearchCV(classifier, {"pooling": ["mean", "first"]}, cv=2, refit=False).fit(X, Y)
    assert len(search.cv_results_["params"]) == 2 and not np.isnan(search.cv_results_["mean_test_score"]).any()


def test_a_regressor_has_a_spread(checkpoint: Path) -> None:
    values = np.array([len(smiles) for smiles in X], float)
    regressor = ExLMRegressor(checkpoint, seeds=2, **QUICK).fit(X, values)
    mean, spread = regressor.predict(X, return_std=True)
    assert mean.shape == spread.shape == (40,) and (spread > 0).all()
    assert regressor.score(X, values) == pytest.approx(
        1 - ((mean - values) ** 2).sum() / ((values - values.mean()) ** 2).sum()
    )


def test_several_targets_with_missing_labels(checkpoint: Path) -> None:
    labels = np.array([["N" in smiles, number % 2] for number, smiles in enumerate(X)], float)
    labels[::5, 1] = np.nan
    classifier = ExLMClassifier(checkpoint, **QUICK).fit(X, labels)
    assert classifier.predict(X).shape == (40, 2)
    assert [one.shape for one in classifier.predict_proba(X)] == [(40, 2)] * 2


def test_what_cannot_be_fitted_is_refused(checkpoint: Path) -> None:
    classifier = ExLMClassifier(checkpoint, **QUICK)
    with pytest.raises(NotFittedError):
        classifier.predict(X)
    with pytest.raises(DataError, match=r"X\[1\]: not SMILES"):
        classifier.fit(["CC", "hello", "CCO"], [0, 1, 1])
    with pytest.raises(ConfigError, match="X has 40 rows, but y has 39"):
        classifier.fit(X, Y[:39])
    with pytest.raises(DataError, match="with one class there is nothing"):
        classifier.fit(X, ["same"] * 40)
    with pytest.raises(DataError, match="no classes; say --task regression"):
        classifier.fit(X, np.linspace(0, 1, 40))
    with pytest.raises(DataError, match="too few"):
        ExLMRegressor(checkpoint, **QUICK).fit(["C", "CC"], [1.0, 2.0])
