"""The learning rate is a pure function of the step."""

from __future__ import annotations

import math

import pytest

from exlm_dist.config.schema import ScheduleConfig
from exlm_dist.training.schedule import learning_rate


def rates(**settings) -> list[float]:
    schedule = ScheduleConfig(**settings)
    return [learning_rate(step, 2.0, schedule) for step in range(schedule.steps)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "inverse_sqrt", "wsd", "constant"])
def test_warm_up_rises_from_zero_to_the_peak_and_nothing_exceeds_it(kind):
    values = rates(steps=40, warmup=8, kind=kind)
    assert values[0] == 0 and values[4] == 1.0 and values[8] == pytest.approx(2.0)
    assert max(values) <= 2.0 and min(values[1:]) > 0
    assert all(later <= earlier + 1e-12 for earlier, later in zip(values[8:], values[9:]))
    assert rates(steps=40, kind=kind)[0] == 2.0


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_the_end_is_one_step_before_the_final_fraction(kind):
    values = rates(steps=1000, warmup=10, kind=kind, final=0.25)
    assert values[-1] == pytest.approx(0.5, rel=0.05) and values[-1] > 0.5


def test_shapes():
    assert rates(steps=20, warmup=0, kind="linear")[10] == pytest.approx(1.0)
    assert rates(steps=20, warmup=0, kind="cosine")[10] == pytest.approx(1.0)
    assert rates(steps=20, warmup=0, kind="cosine")[5] == pytest.approx(1 + math.cos(math.pi / 4))
    assert rates(steps=100, warmup=4, kind="inverse_sqrt")[16] == pytest.approx(1.0)
    decay = rates(steps=100, warmup=5, kind="wsd", decay=0.2)
    assert decay[5:81] == [2.0] * 76 and decay[90] == pytest.approx(1.0)
    assert rates(steps=100, warmup=50, kind="wsd", decay=1.0)[75] == pytest.approx(1.0)


def test_as_fairseq_polynomial_decay():
    """Rates recorded from the authors' run: lr 5e-3, warm-up 6, 30 updates in all."""
    values = [learning_rate(step, 5e-3, ScheduleConfig(steps=30, warmup=6)) for step in range(30)]
    expected = [5e-3 * step / 6 if step <= 6 else 5e-3 * (1 - (step - 6) / 24) for step in range(30)]
    assert values == pytest.approx(expected, rel=1e-12)
