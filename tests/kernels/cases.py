"""Plain versions to compare with: every path enumerated, every probability written out."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from exlm_dist.kernels.transitions import JumpPrior


def starts_of(lengths: list[int]) -> Tensor:
    """Cumulative lengths [B+1]."""
    return torch.tensor([0, *itertools.accumulate(lengths)])


def prior_score(prior: JumpPrior | None, v: int, u: int, k: int) -> float:
    """What a prior over jumps adds to the score of going from v to u, number by number."""
    if prior is None:
        return 0.0
    if prior.kind == "gaussian":
        return max(-prior.floor, -((u - v - k) ** 2) / (2 * prior.width**2))
    distance = abs(u // k - v // k - 1) if prior.kind == "group" else abs(u - v - k)
    return max(-prior.floor, -distance / prior.width)


def transition_probability(
    query: Tensor, key: Tensor, gate: Tensor, v: int, u: int, allowed: list[int], bias: list[float]
) -> float:
    """E[v, u] of one sequence, number by number; `allowed` are the states that may follow v, `bias` is added to the
    score of each state."""
    total = 0.0
    for q, keys, own_gate in zip(query[v].tolist(), key.transpose(0, 1).tolist(), gate[v].tolist()):
        scores = [sum(a * b for a, b in zip(q, k)) / math.sqrt(len(q)) for k in keys]
        weights = [math.exp(score + extra) for score, extra in zip(scores, bias)]
        gates = sum(math.exp(other) for other in gate[v].tolist())
        total += math.exp(own_gate) / gates * weights[u] / sum(weights[w] for w in allowed)
    return total


def paths(targets: int, states: int, ends: int) -> list[tuple[int, ...]]:
    """Every rising choice of `targets` states that starts and stops in the `ends` states where a path may."""
    every = itertools.combinations(range(states), targets)
    return [path for path in every if path[0] < ends and path[-1] >= states - ends]


def path_scores(match: Tensor, transitions: Tensor, targets: int, states: int, ends: int) -> tuple[list, Tensor]:
    """(paths, log-probability of each) of one graph."""
    chosen = paths(targets, states, ends)
    scores = []
    for path in chosen:
        emitted = sum(match[i, u] for i, u in enumerate(path))
        scores.append(emitted + sum(transitions[v, u] for v, u in zip(path, path[1:])) - math.log(ends))
    return chosen, torch.stack(scores) if scores else torch.empty(0)


def random_graph(
    num_targets: list[int], num_states: list[int], *, seed: int = 0, scale: float = 1.0, kind: str = "dense"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """match [B, N, L] and transitions [B, L, L] in fp64 with their sizes; entries outside a graph are noise."""
    generator = torch.Generator().manual_seed(seed)
    count, targets, states = len(num_targets), max(num_targets), max(num_states)
    match = torch.randn(count, targets, states, generator=generator, dtype=torch.float64) * scale - 1
    scores = torch.randn(count, states, states, generator=generator, dtype=torch.float64) * scale
    index = torch.arange(states)
    allowed = index[:, None] < index
    if kind == "sparse":
        allowed &= index <= index[:, None] + 2
    transitions = scores.masked_fill(~allowed, -math.inf).log_softmax(-1).nan_to_num(nan=-math.inf)
    return match, transitions.masked_fill(~allowed, -math.inf), torch.tensor(num_targets), torch.tensor(num_states)
