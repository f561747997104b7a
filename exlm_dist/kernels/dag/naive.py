"""The definition of the likelihood of the targets over the graph of states: one sequence after the other, in log space.

`torch.py` and `triton/` compute the same faster and are tested against this. Arguments and results as in `__init__.py`,
in the type of the inputs. Sources: ExLM (arXiv 2501.13397) section 3, DA-Transformer (arXiv 2205.07459) section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def dag_log_likelihood(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int = 1
) -> Tensor:
    """log P [B] = logsumexp over the last `ends` states u of alpha[N-1, u] (-inf, with gradient 0, without a path):

    alpha[0, u] = match[0, u] - log ends for u < ends, -inf for later states;
    alpha[i, u] = match[i, u] + logsumexp_{v < u}(alpha[i-1, v] + transitions[v, u]).
    match [B, N, L], transitions [B, L, L]: log-probabilities; num_targets, num_states [B] of each sequence.
    """
    log_likelihoods = []
    for alpha, later_rows, edges in _graphs(match, transitions, num_targets, num_states, ends):
        for row in later_rows:
            alpha = row + _logsumexp(alpha[:, None] + edges)
        log_likelihoods.append(_logsumexp(alpha[-ends:]))
    return torch.stack(log_likelihoods)


def dag_posteriors(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int = 1
) -> Tensor:
    """gamma [B, N, L] = d log P / d match: the probability that target i sits on state u, given the targets."""
    with torch.enable_grad():
        match = match.detach().requires_grad_()
        log_likelihood = dag_log_likelihood(match, transitions, num_targets, num_states, ends=ends)
        return torch.autograd.grad(log_likelihood.sum(), match)[0]


def dag_best_path(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, *, ends: int = 1
) -> tuple[Tensor, Tensor]:
    """(target on each state, or -1 [B, L]; score [B]): max for logsumexp, the first of equals, then the way back."""
    path, scores = torch.full_like(match[:, 0], -1, dtype=torch.int64), []
    for b, (best, later_rows, edges) in enumerate(_graphs(match, transitions, num_targets, num_states, ends)):
        sources = []  # of each later target and state, the state before it
        for row in later_rows:
            arrival, source = (best[:, None] + edges).max(dim=0)
            best = row + arrival
            sources.append(source)
        score, last = best[-ends:].max(dim=0)
        visited = [last + max(len(best) - ends, 0)]
        for source in reversed(sources):
            visited.append(source[visited[-1]])
        if score > -math.inf:
            for i, state in enumerate(reversed(visited)):
                path[b, state] = i
        scores.append(score)
    return path, torch.stack(scores)


def _graphs(
    match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, ends: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each sequence: alpha[0] [L], match of the later targets [N-1, L], transitions [L, L], -inf unless v < u."""
    for b, (targets, states) in enumerate(zip(num_targets.tolist(), num_states.tolist())):
        own, index = match[b, :targets, :states], torch.arange(states, device=match.device)
        edges = transitions[b, :states, :states].masked_fill(index[:, None] >= index, -math.inf)
        yield own[0].masked_fill(index >= ends, -math.inf) - math.log(ends), own[1:], edges


def _logsumexp(x: Tensor) -> Tensor:
    """Over the first dimension; where every term is -inf, -inf with gradient 0 (torch alone: NaN)."""
    impossible = (x == -math.inf).all(0)
    return x.masked_fill(impossible, 0).logsumexp(0).masked_fill(impossible, -math.inf)
