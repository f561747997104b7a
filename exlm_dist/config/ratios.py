"""The masking ratio over a run: a pure function of the step."""

from __future__ import annotations

from exlm_dist.config.schema import MaskingConfig

#: Points (step, ratio), by ascending step.
Schedule = tuple[tuple[int, float], ...]


def ratio_at(ratio: float, schedule: Schedule, step: int) -> float:
    """The ratio with which global batch `step` (from 0) is masked, on average over its sequences.

    Between (0, ratio) and the points of the schedule it changes linearly; of points at one step the last counts from
    there on, which makes it jump.
    """
    points = [(0, ratio), *schedule]
    before = max(index for index, (first, _) in enumerate(points) if first <= step)
    start, here = points[before]
    if before + 1 == len(points):
        return here
    end, target = points[before + 1]
    return here + (target - here) * ((step - start) / (end - start))


def largest_ratio(ratio: float, schedule: Schedule) -> float:
    """The largest ratio of any step, on average over its sequences."""
    return max([ratio, *(later for _, later in schedule)])


def describe_masking(masking: MaskingConfig) -> str:
    """The masking of training in words: `15% of the tokens`, `30% to 5% of the tokens, whole words, spans`."""
    ratios = dict.fromkeys(f"{ratio:.0%}" for ratio in [masking.ratio, *(later for _, later in masking.schedule)])
    parts = [" to ".join(ratios) + " of the tokens"]
    if masking.spread:
        parts.append(f"+- {masking.spread:.0%} from sequence to sequence")
    if masking.unit != "token":
        parts.append(f"whole {masking.unit}s")
    if masking.span_p:
        parts.append("spans")
    if masking.copies > 1:
        parts.append(f"{masking.copies} copies of each")
    return ", ".join(parts)


def masking_problems(masking: MaskingConfig) -> list[str]:
    """The rules between the settings of masking that are broken."""
    problems = []
    if masking.keep + masking.random > 1:
        problems.append(f"masking.keep {masking.keep} + masking.random {masking.random} is more than 1.")
    for (first, _), (second, _) in zip(masking.schedule, masking.schedule[1:]):
        if second < first:
            problems.append(f"masking.schedule has step {second} after step {first}: put its points in order.")
    highest = largest_ratio(masking.ratio, masking.schedule)
    lowest = min([masking.ratio, *(ratio for _, ratio in masking.schedule)])
    room = min(lowest, 1 - highest)
    if masking.spread >= room:
        problems.append(
            f"masking.spread {masking.spread:g} around ratios from {lowest:g} to {highest:g} leaves (0, 1). "
            f"Set masking.spread below {room:g}."
        )
    if masking.unit == "ring" and masking.span_p:
        problems.append(
            f"masking.span_p {masking.span_p:g} makes spans of consecutive tokens, words or atoms, and rings are not "
            "consecutive. Set masking.span_p 0, or masking.unit atom."
        )
    if masking.copies > 1 and (masking.unit != "token" or masking.span_p):
        problems.append(
            f"masking.copies {masking.copies} masks each copy by itself. Set masking.unit token and masking.span_p 0, "
            "or masking.copies 1."
        )
    return problems
