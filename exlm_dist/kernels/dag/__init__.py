"""Likelihood of a target sequence over the graph of states (maths: README.md beside this file)."""

from __future__ import annotations

from torch import Tensor, no_grad

from exlm_dist.kernels.backend import implementation
from exlm_dist.kernels.checks import check_shape

__all__ = ["dag_best_path", "dag_log_likelihood", "dag_posteriors"]


def dag_log_likelihood(
    match: Tensor,
    transitions: Tensor,
    num_targets: Tensor,
    num_states: Tensor,
    *,
    ends: int = 1,
    backend: str = "auto",
) -> Tensor:
    """log P(targets) [B] summed over all paths through the states that emit the targets in order.

    match [B, N, L]: log p(target i | state u); transitions [B, L, L]: log-probability of moving from v to u (only
    v < u is read); num_targets, num_states [B] int64. A path starts at one of the first `ends` states, each with
    probability 1/ends, and stops at one of the last `ends`; every visited state emits one target.
    fp32 (fp64 for fp64 input). Differentiable in match and transitions; where no path exists -inf, with gradient 0.
    ValueError on shapes that do not fit. Source: ExLM (arXiv 2501.13397) section 3, DA-Transformer (2205.07459).
    """
    _check(match, transitions, num_targets, num_states, ends)
    chosen = implementation("dag", backend, match.device)
    return chosen.dag_log_likelihood(match, transitions, num_targets, num_states, ends=ends)


def dag_posteriors(
    match: Tensor,
    transitions: Tensor,
    num_targets: Tensor,
    num_states: Tensor,
    *,
    ends: int = 1,
    backend: str = "auto",
) -> Tensor:
    """gamma [B, N, L]: probability that target i sits on state u, given the targets; no gradient.

    Arguments as for `dag_log_likelihood`. Rows of a sequence's own targets sum to 1; everything is 0 for a sequence
    without a path. With match = 0 this is the prior of the path given the number of targets.
    """
    _check(match, transitions, num_targets, num_states, ends)
    chosen = implementation("dag", backend, match.device)
    with no_grad():
        return chosen.dag_posteriors(match, transitions, num_targets, num_states, ends=ends)


def dag_best_path(
    match: Tensor,
    transitions: Tensor,
    num_targets: Tensor,
    num_states: Tensor,
    *,
    ends: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The most probable single path: (path [B, L] int64, score [B]); no gradient.

    Arguments as for `dag_log_likelihood`. path is the target index that each state emits, -1 for a state that is not
    visited; score its log-probability. A sequence without a path has -1 throughout and score -inf.
    """
    _check(match, transitions, num_targets, num_states, ends)
    chosen = implementation("dag", backend, match.device)
    with no_grad():
        return chosen.dag_best_path(match, transitions, num_targets, num_states, ends=ends)


def _check(match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, ends: int) -> None:
    check_shape("match", match, (None, None, None))
    count, targets, states = match.shape
    check_shape("transitions", transitions, (count, states, states))
    check_shape("num_targets", num_targets, (count,))
    check_shape("num_states", num_states, (count,))
    if ends < 1:
        raise ValueError(f"ends is {ends}, expected at least 1")
    if match.dtype != transitions.dtype:
        raise ValueError(f"match is {match.dtype}, transitions are {transitions.dtype}; they must be of one type")
    if match.device.type != "cpu":
        return
    for name, lengths, limit in (("num_targets", num_targets, targets), ("num_states", num_states, states)):
        if not (1 <= int(lengths.min()) and int(lengths.max()) <= limit):
            raise ValueError(f"{name} must be from 1 to {limit}, got {lengths.tolist()}")
