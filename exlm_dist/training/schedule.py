"""Learning rate as a pure function of the step: resuming is a computation, there is no state to save."""

from __future__ import annotations

import math

from exlm_dist.config.schema import ScheduleConfig


def learning_rate(step: int, peak: float, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up from 0 to `peak`, then the shape `schedule.kind`.

    As in fairseq, which the authors used: step t of the warm-up has `peak * t / warmup`, so the first step of a run
    with warm-up changes nothing, and `final * peak` would be reached one step after the last.
    """
    if step < schedule.warmup:
        return peak * step / schedule.warmup
    return peak * _fraction(step, schedule)


def rates_agree(steps: int, peak: float, one: ScheduleConfig, other: ScheduleConfig) -> bool:
    """Whether both schedules give the first `steps` steps the same rates, to the bit: a run that has done them may go
    on by either."""
    same = (learning_rate(step, peak, one) == learning_rate(step, peak, other) for step in range(steps))
    return one == other or all(same)


def _fraction(step: int, schedule: ScheduleConfig) -> float:
    """Fraction of the peak after the warm-up."""
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "inverse_sqrt":
        # Vaswani et al. 2017, eq. 3, scaled so that it starts at 1 (a run without warm-up counts from its first step).
        start = max(schedule.warmup, 1)
        return math.sqrt(start / max(step, start))
    if schedule.kind == "wsd":
        start = max(schedule.warmup, schedule.steps - max(1, round(schedule.decay * schedule.steps)))
        return _interpolated(max(0.0, (step - start) / (schedule.steps - start)), schedule.final)
    progress = (step - schedule.warmup) / (schedule.steps - schedule.warmup)
    if schedule.kind == "linear":
        return _interpolated(progress, schedule.final)
    return schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * progress))


def _interpolated(progress: float, final: float) -> float:
    return 1.0 + (final - 1.0) * progress
