"""The training of one member: loss with missing labels, batches, layer rates, early stopping, going on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from molecule_table import molecules
from sklearn import metrics as sklearn_metrics

from exlm_dist.finetuning import member
from exlm_dist.finetuning.criterion import TargetCriterion
from exlm_dist.finetuning.dataset import Examples
from exlm_dist.finetuning.ensemble import with_features
from exlm_dist.finetuning.finetune_settings import TrainingSettings
from exlm_dist.finetuning.losses import predicted_values, weighted_loss
from exlm_dist.finetuning.member import batches_of_epoch, train_member
from exlm_dist.finetuning.metrics import evaluate_predictions
from exlm_dist.finetuning.property_model import PropertyModel, build_property_model
from exlm_dist.finetuning.targets import Target
from exlm_dist.inference.loading import LoadedCheckpoint, load_checkpoint
from exlm_dist.tokenizers.encoding import encode_texts

TARGETS = [
    Target("two", "binary", ("0", "1")),
    Target("three", "multiclass", ("a", "b", "c")),
]
LEARNED = TargetCriterion(TARGETS)
VALUE = Target("value", "regression", mean=2.0, std=3.0)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedCheckpoint:
    return load_checkpoint(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def examples(loaded: LoadedCheckpoint) -> Examples:
    """40 molecules with two targets, a third of whose labels are missing."""
    texts = molecules(40)
    encoded = encode_texts(loaded.tokenizer, texts, max_tokens=62)
    labels = np.array([["N" in text, number % 3] for number, text in enumerate(texts)], float)
    labels[np.random.default_rng(0).random(labels.shape) < 0.3] = np.nan
    labels[np.isnan(labels).all(axis=1), 0] = 1
    return Examples(encoded.tokens, encoded.lengths, labels)


def make_model(loaded: LoadedCheckpoint, frozen: bool = False) -> PropertyModel:
    return build_property_model(
        loaded.model, loaded.config.model, 4, seed=3, pooling="mean", dropout=0.1, frozen=frozen
    )


def train(loaded: LoadedCheckpoint, examples: Examples, settings: TrainingSettings, **options):
    model = make_model(loaded, settings.frozen)
    rows = np.arange(40)
    progress = train_member(
        model,
        LEARNED,
        examples.take(rows[:30]),
        examples.take(rows[30:]),
        settings.for_task("classification"),
        3,
        **options,
    )
    return model, progress


class Store:
    """Keeps the state in memory, and ends the training after `last` epochs as a kill would."""

    def __init__(self, last: int | None = None):
        self.last, self.state = last, None

    def save(self, tensors, facts):
        import copy

        self.state = ({name: value.clone() for name, value in tensors.items()}, copy.deepcopy(facts))
        if len(facts["history"]) == self.last:
            raise KeyboardInterrupt

    def load(self):
        return self.state


def test_missing_labels_have_no_loss_and_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 5, generator=generator, requires_grad=True)
    labels = torch.tensor([[0, 2, 1.0], [1, math.nan, 5], [math.nan, 0, math.nan], [1, 1, -2], [math.nan] * 3]).double()
    weights = torch.where(labels.isnan(), 0.0, torch.rand(5, 3, generator=generator).double())
    targets = [*TARGETS, VALUE]
    wanted = 0.0
    for row in range(5):
        values = outputs[row].tolist()
        if not labels[row, 0].isnan():
            probability = 1 / (1 + math.exp(-values[0]))
            wanted -= weights[row, 0].item() * math.log(probability if labels[row, 0] == 1 else 1 - probability)
        if not labels[row, 1].isnan():
            total = sum(math.exp(value) for value in values[1:4])
            wanted -= weights[row, 1].item() * math.log(math.exp(values[1 + int(labels[row, 1])]) / total)
        if not labels[row, 2].isnan():
            wanted += weights[row, 2].item() * (values[4] - (labels[row, 2].item() - 2) / 3) ** 2
    loss = weighted_loss(outputs, labels, weights, targets)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    assert not outputs.grad[4].any() and not outputs.grad[2, [0, 4]].any() and not outputs.grad[1, 1:4].any()
    assert outputs.grad[0].all()


def test_predicted_values_are_probabilities_and_values_in_their_unit() -> None:
    outputs = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.5]])
    assert predicted_values(outputs, [*TARGETS, VALUE]).tolist() == [pytest.approx([0.5, 1 / 3, 1 / 3, 1 / 3, 6.5])]


def test_metrics_are_means_over_the_targets_on_which_they_are_defined() -> None:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, (50, 3)).astype(float)
    labels[:, 1] = 1  # one class only
    labels[generator.random((50, 3)) < 0.2] = np.nan
    values = generator.random((50, 3))
    targets = [Target(str(number), "binary", ("0", "1")) for number in range(3)]
    scores = evaluate_predictions(values, labels, targets)
    areas = []
    for column in (0, 2):  # by pairs: how often a positive is above a negative
        positive, negative = (values[labels[:, column] == label, column] for label in (1, 0))
        areas.append((positive[:, None] > negative).mean())
    assert scores["roc_auc"] == pytest.approx(np.mean(areas)) and scores["skipped"] == 1
    undefined = evaluate_predictions(values, np.ones((50, 3)), targets)
    assert math.isnan(undefined["roc_auc"]) and undefined["skipped"] == 3


def test_metrics_of_values_and_of_several_classes() -> None:
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 6, 40) / 2
    values = labels + generator.normal(0, 1, 40).round(1)
    scores = evaluate_predictions(values[:, None], labels[:, None], [VALUE])
    from scipy import stats

    assert scores["rmse"] == pytest.approx(np.sqrt(((values - labels) ** 2).mean()))
    assert scores["pearson"] == pytest.approx(stats.pearsonr(values, labels)[0])
    assert scores["spearman"] == pytest.approx(stats.spearmanr(values, labels)[0])
    assert math.isnan(evaluate_predictions(np.ones((40, 1)), labels[:, None], [VALUE])["pearson"])
    classes = generator.integers(0, 3, 40).astype(float)
    probabilities = generator.dirichlet([1, 1, 1], 40)
    scores = evaluate_predictions(probabilities, classes[:, None], [TARGETS[1]])
    assert scores["roc_auc"] == pytest.approx(
        sklearn_metrics.roc_auc_score(classes, probabilities, multi_class="ovr", average="macro")
    )
    assert scores["accuracy"] == (probabilities.argmax(1) == classes).mean()


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    batches = batches_of_epoch(103, 10, 5, 2)
    assert sorted(np.concatenate(batches).tolist()) == list(range(103))
    assert {len(batch) for batch in batches} == {9, 10}
    assert all((one == two).all() for one, two in zip(batches, batches_of_epoch(103, 10, 5, 2)))
    assert any((one != two).any() for one, two in zip(batches, batches_of_epoch(103, 10, 5, 3)))
    assert any((one != two).any() for one, two in zip(batches, batches_of_epoch(103, 10, 6, 2)))


def test_the_gradient_does_not_depend_on_the_micro_batches(
    loaded: LoadedCheckpoint, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(loaded).eval()
    weights = np.where(np.isnan(examples.labels), 0.0, 1.0)
    gradients = []
    for tokens in (100_000, 60):
        monkeypatch.setitem(member.BATCH_TOKENS, "cpu", tokens)
        model.zero_grad()
        loss = member._train_batch(model, LEARNED, examples, weights, 0)
        gradients.append((loss, torch.cat([value.grad.flatten() for value in model.trainable().values()])))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-4, atol=1e-7)


def test_an_interrupted_member_goes_on_to_the_same_bits(loaded: LoadedCheckpoint, examples: Examples) -> None:
    settings = TrainingSettings(epochs=4, batch=8, lr=0.01, patience=0)
    whole, progress = train(loaded, examples, settings)
    store = Store(last=2)
    with pytest.raises(KeyboardInterrupt):
        train(loaded, examples, settings, store=store)
    store.last = None
    model, resumed = train(loaded, examples, settings, store=store)
    assert all(torch.equal(value, model.weights()[name]) for name, value in whole.weights().items())
    assert [one["train_loss"] for one in resumed.history] == [one["train_loss"] for one in progress.history]
    assert [one["valid"] for one in resumed.history] == [one["valid"] for one in progress.history]
    again, finished = train(loaded, examples, settings, store=store)
    assert len(finished.history) == 4
    assert all(torch.equal(value, again.weights()[name]) for name, value in whole.weights().items())


def test_the_best_epoch_is_kept_and_patience_ends_a_member(loaded: LoadedCheckpoint, examples: Examples) -> None:
    model, progress = train(loaded, examples, TrainingSettings(epochs=30, batch=8, lr=0.05, patience=2))
    keys = [(one["valid"]["roc_auc"], -one["valid_loss"]) for one in progress.history]
    scores = [score for score, _ in keys]
    assert progress.best_epoch == 1 + keys.index(max(keys)) and len(scores) == min(30, progress.best_epoch + 2)
    values, _ = member.evaluate(model, LEARNED, examples.take(np.arange(30, 40)))
    assert evaluate_predictions(values, examples.labels[30:], TARGETS)["roc_auc"] == max(scores)


@pytest.mark.parametrize(
    "metric, value, loss, better",
    [
        ("rmse", 1.0, 9, True),
        ("rmse", 2.0, 0, False),
        ("r2", 2.0, 9, True),
        ("r2", 1.0, 0, False),
        ("r2", 1.5, 0.5, True),
        ("r2", 1.5, 2, False),
        ("r2", math.nan, 0, False),
    ],
)
def test_the_metric_decides_and_where_it_is_equal_the_loss(metric, value, loss, better) -> None:
    history = [{"valid": {metric: earlier}, "valid_loss": 1.0} for earlier in (1.5, math.nan)]
    record = {"valid": {metric: value}, "valid_loss": loss}
    assert member._better(metric, record, history) == better
    assert member._better(metric, record, [])


def test_a_frozen_body_does_not_change(loaded: LoadedCheckpoint, examples: Examples) -> None:
    model, _ = train(loaded, examples, TrainingSettings(epochs=1, batch=8, lr=0.01, frozen=True))
    before = dict(loaded.model.named_parameters())
    changed = {name for name, value in model.weights().items() if name not in before or not value.equal(before[name])}
    assert changed and all(name.startswith("head.") for name in changed)


def test_rates_fall_from_layer_to_layer(loaded: LoadedCheckpoint) -> None:
    model = make_model(loaded)
    settings = {
        parameter: group
        for group in member._optimizer(model, TrainingSettings(layer_decay=0.5)).param_groups
        for parameter in group["params"]
    }
    of = {name: settings[parameter] for name, parameter in model.weights().items()}
    assert {group["factor"] for name, group in of.items() if name.startswith(("head.", "norm."))} == {1}
    assert {group["factor"] for name, group in of.items() if name.startswith("blocks.1.")} == {0.5}
    assert {group["factor"] for name, group in of.items() if name.startswith("blocks.0.")} == {0.25}
    assert of["embedding.weight"]["factor"] == 0.125
    assert of["embedding.weight"]["weight_decay"] == of["head.out.weight"]["weight_decay"] == 0.01
    assert of["norm.weight"]["weight_decay"] == of["head.out.bias"]["weight_decay"] == 0


def test_the_rate_rises_and_falls_to_zero() -> None:
    settings = TrainingSettings(epochs=10, batch=10, lr=1.0 / 2, warmup=0.1)
    rates = [member._rate(settings, 100, step) for step in range(101)]
    assert max(rates) == pytest.approx(0.5) and rates.index(max(rates)) in (9, 10)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True) and rates[100] == 0 and rates[0] > 0


def test_features_that_are_read_once_train_the_same_head(loaded: LoadedCheckpoint, examples: Examples) -> None:
    """Up to the rounding of the encoder, whose micro-batches differ."""
    settings = TrainingSettings(epochs=3, batch=8, lr=0.01, frozen=True)
    store = Store()
    model, progress = train(loaded, with_features(loaded, examples, "mean"), settings, store=store)
    other, expected = train(loaded, examples, settings)
    assert [one["train_loss"] for one in progress.history] == pytest.approx(
        [one["train_loss"] for one in expected.history], rel=1e-4
    )
    values, loss = member.evaluate(model, LEARNED, examples)
    own, same = member.evaluate(model, LEARNED, with_features(loaded, examples, "mean"))
    assert np.allclose(values, own, atol=1e-5) and loss == pytest.approx(same, rel=1e-4)
    assert np.allclose(values, member.evaluate(other, LEARNED, examples)[0], atol=1e-3)
    names = {name.split("/", 1)[1].split(".")[0] for name in store.state[0]}
    assert names == {"head"}, "the state is of what is trained"


def test_the_weights_of_the_last_epoch_are_kept_where_that_is_asked_for(
    loaded: LoadedCheckpoint, examples: Examples
) -> None:
    """A later epoch is not better here, and patience does not end the training."""
    settings = TrainingSettings(epochs=3, batch=40, lr=1e-9, patience=1, keep="last")
    model, progress = train(loaded, examples, settings)
    assert progress.best_epoch == len(progress.history) == 3
    assert all(torch.equal(value, progress.best[name]) for name, value in model.trainable().items())
