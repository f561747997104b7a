"""`benchmarks/states.py`: what it measures the states against is what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from locations import ROOT


@pytest.fixture
def states(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return pytest.importorskip("states")


def entropy(rows: np.ndarray) -> float:
    counts = np.unique(rows, axis=0, return_counts=True)[1]
    return float(-(counts / counts.sum() * np.log(counts / counts.sum())).sum())


@pytest.mark.parametrize("name", ["twice", "pairs", "topics", "context"])
def test_the_best_joint_and_independent_distributions_have_these_entropies(states, name: str) -> None:
    task = states.TASKS[name]
    rows = np.unique(task.draw(np.random.default_rng(0), 10000), axis=0)
    seen = [i for i in range(rows.shape[1]) if i not in task.masked]
    visible = entropy(rows[:, seen]) if seen else 0.0
    assert entropy(rows) - visible == pytest.approx(task.joint)
    singly = [entropy(rows[:, [*seen, i]]) - visible for i in task.masked]
    assert sum(singly) == pytest.approx(task.independent)


def test_a_uniform_start_has_no_curvature_and_lanes_have_the_predicted_one(states) -> None:
    for lane in (0.0, 2.0):
        saddle = states.Saddle(lane)
        same = math.exp(lane) / (math.exp(lane) + 3)
        assert saddle.curvature() == pytest.approx(-(same - (1 - same) / 3) / 16, abs=1e-9)
    ratios = [states.Saddle(lane).gradient(1e-2) / states.Saddle(lane).gradient(1e-3) for lane in (0.0, 2.0)]
    assert ratios == pytest.approx([100, 10], rel=0.05), "of second order, of first order"


def test_every_arm_has_a_finite_loss_and_closes_no_group_of_states(states) -> None:
    task = states.TASKS["twice"]
    letters = task.draw(np.random.default_rng(0), 8)
    for name, arm in states.ARMS.items():
        toy, generator = states.Toy(arm, 0, 3), torch.Generator().manual_seed(0)
        result = toy(states.stream_of(task, letters, toy.config)[0])
        loss = states.loss_of(result, arm, generator, 0.0)
        loss.backward()
        assert torch.isfinite(loss), name
        closed = states.closed_states(result, 0.9, generator).unflatten(1, (-1, 3))
        assert closed.any() and not closed.all(2).any()
