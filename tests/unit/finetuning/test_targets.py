"""What columns of labels are taken for, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from exlm_dist.finetuning.targets import label_weights, output_slices, read_targets, with_scaling
from exlm_dist.utils.errors import DataError


def read(values: list[str | None], task: str | None = None, name: str = "y"):
    return read_targets({name: values}, [f"t.csv: row {row}" for row in range(1, len(values) + 1)], task)


@pytest.mark.parametrize(
    "values, kind, classes",
    [
        (["0", "1", "1.0", "0.0"], "binary", ("0", "1")),
        (["yes", "no", "no"], "binary", ("no", "yes")),
        (["-1", "1", "-1"], "binary", ("-1", "1")),
        (["0.5", "1.5", "0.5"], "binary", ("0.5", "1.5")),
        (["a", "b", "c", "a", "b", "c"], "multiclass", ("a", "b", "c")),
        (["2", "10", "3"] * 10, "multiclass", ("2", "3", "10")),
        (["2", "10", "3"] * 9, "regression", None),
        (["0.1", "0.2", "0.3"] * 20, "regression", None),
        ([str(number) for number in range(40)], "regression", None),
    ],
)
def test_the_kind_follows_from_the_values(values: list[str], kind: str, classes: tuple[str, ...] | None) -> None:
    (target,), labels, remarks = read(values)
    assert (target.kind, target.classes) == (kind, classes)
    assert bool(remarks) == (classes == ("2", "3", "10"))
    for value, label in zip(values, labels[:, 0]):
        if classes is None:
            assert float(value) == label
        else:
            shown = classes[int(label)]
            assert shown == value or float(shown) == float(value)


def test_whole_numbers_that_are_values_can_be_said_to_be() -> None:
    (target,), labels, remarks = read(["2", "10", "3"] * 10, task="regression")
    assert target.kind == "regression" and labels[:3, 0].tolist() == [2, 10, 3] and not remarks


def test_what_is_missing_has_no_label() -> None:
    _, labels, _ = read(["0", "", None, "NA", "nan", "1"])
    assert np.isnan(labels[:, 0]).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize(
    "values, task, message",
    [
        (["1", "1", ""], None, r"target 'y' is '1' in all 2 rows that have a label"),
        (["", None], None, "has no label in any row"),
        (["1.5", "high", "3", "2"], "regression", r"t.csv: row 2: target 'y' is 'high', which is no finite number"),
        (["1.5", "1e999", "2"], "regression", r"row 2: target 'y' is '1e999'"),
        (["1.5", "inf", "2"], "regression", "which is no finite number"),
        ([str(0.1 * n) for n in range(50)], "classification", "these are no classes; say --task regression"),
        ([f"name {n}" for n in range(50)], None, "these are no classes; name another column"),
    ],
)
def test_labels_that_do_not_fit_are_refused(values: list[str | None], task: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(values, task)


def test_targets_of_different_tasks_are_refused() -> None:
    columns = {"a": ["0", "1", "0"], "b": ["0.5", "1.5", "2.5"]}
    with pytest.raises(DataError, match="'a': classification, 'b': regression.*--task"):
        read_targets(columns, ["?"] * 3, None)


def test_scaling_is_that_of_the_known_labels() -> None:
    targets, labels, _ = read(["1.5", "", "3.5", "8.5"])
    (scaled,) = with_scaling(targets, labels, True)
    assert scaled.mean == pytest.approx(4.5) and scaled.std == pytest.approx(np.std([1.5, 3.5, 8.5]))
    (plain,) = with_scaling(targets, labels, False)
    assert (plain.mean, plain.std) == (0, 1)
    with pytest.raises(DataError, match="the same value in all rows"):
        with_scaling(targets, labels[:2], True)


def test_balanced_weights_give_each_class_the_same_sum() -> None:
    targets, labels, _ = read(["a", "b", "b", "", "b", "c"])
    assert label_weights(targets, labels, "none")[:, 0].tolist() == [1, 1, 1, 0, 1, 1]
    weights = label_weights(targets, labels, "balanced")[:, 0]
    sums = [weights[labels[:, 0] == label].sum() for label in range(3)]
    assert sums == pytest.approx([5 / 3] * 3) and weights[3] == 0


def test_outputs_lie_one_after_another() -> None:
    columns = {"a": ["0", "1", "0"], "b": ["x", "y", "z"], "c": ["u", "v", "v"]}
    targets, _, _ = read_targets(columns, ["?"] * 3, None)
    assert output_slices(targets) == [slice(0, 1), slice(1, 4), slice(4, 5)]
