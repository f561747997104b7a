"""The masking ratio over a run, and the settings of masking that contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

from exlm_dist.config.ratios import describe_masking, largest_ratio, masking_problems, ratio_at
from exlm_dist.config.schema import MaskingConfig

SCHEDULE = ((4, 0.3), (4, 0.15), (8, 0.05))


def test_ratio_is_linear_between_points_and_jumps_at_two() -> None:
    assert [round(ratio_at(0.2, SCHEDULE, step), 4) for step in (0, 2, 3, 4, 6, 8, 99)] == [
        0.2,
        0.25,
        0.275,
        0.15,
        0.1,
        0.05,
        0.05,
    ]
    assert ratio_at(0.2, (), 7) == 0.2 and ratio_at(0.2, ((0, 0.4),), 0) == 0.4
    assert largest_ratio(0.2, SCHEDULE) == 0.3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": SCHEDULE, "spread": 0.05}, "masking.spread 0.05 around ratios from 0.05 to 0.3"),
        ({"schedule": ((9, 0.1), (3, 0.2))}, "step 3 after step 9"),
        ({"unit": "ring", "span_p": 0.2}, "Set masking.span_p 0, or masking.unit atom"),
        ({"keep": 0.7, "random": 0.6}, "is more than 1"),
        ({"copies": 2, "unit": "word"}, "masking.copies 2 masks each copy by itself"),
        ({"copies": 2, "span_p": 0.2}, "masking.copies 2 masks each copy by itself"),
    ],
)
def test_contradictions_are_named(settings: dict[str, Any], words: str) -> None:
    (problem,) = masking_problems(MaskingConfig(**settings))
    assert words in problem


def test_masking_in_words() -> None:
    assert masking_problems(MaskingConfig()) == [] and describe_masking(MaskingConfig()) == "15% of the tokens"
    whole = MaskingConfig(ratio=0.3, schedule=SCHEDULE, unit="word", span_p=0.2, spread=0.04)
    assert describe_masking(whole) == (
        "30% to 15% to 5% of the tokens, +- 4% from sequence to sequence, whole words, spans"
    )
    assert describe_masking(MaskingConfig(copies=3)) == "15% of the tokens, 3 copies of each"
