"""Plain versions to compare with: every path enumerated, every probability written out."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def starts_of(lengths: list[int]) -> Tensor:
    """Cumulative lengths [B+1]."""
    return torch.tensor([0, *itertools.accumulate(lengths)])


def naive_transitions(query: Tensor, key: Tensor, gate: Tensor, group: int | None) -> Tensor:
    """log E [L, L] of one sequence in the probability domain."""
    states, heads, width = query.shape
    out = torch.full((states, states), -math.inf, dtype=query.dtype)
    share = gate.softmax(-1)
    for v in range(states):
        later = [u for u in range(states) if u > v and (group is None or u // group == v // group + 1)]
        if later:
            scores = torch.einsum("hp,uhp->uh", query[v], key[later]) / math.sqrt(width)
            out[v, later] = (scores.softmax(0) * share[v]).sum(1).log()
    return out


def paths(targets: int, states: int, ends: int) -> list[tuple[int, ...]]:
    """Every rising choice of `targets` states that starts and stops where it may."""
    every = itertools.combinations(range(states), targets)
    return [path for path in every if path[0] < ends and path[-1] >= states - ends]


def path_scores(match: Tensor, moves: Tensor, targets: int, states: int, ends: int) -> tuple[list, Tensor]:
    """(paths, log-probability of each) of one graph."""
    chosen = paths(targets, states, ends)
    scores = [
        sum(match[i, u] for i, u in enumerate(path)) + sum(moves[v, u] for v, u in zip(path, path[1:])) - math.log(ends)
        for path in chosen
    ]
    return chosen, torch.stack([torch.as_tensor(score) for score in scores]) if scores else torch.empty(0)


def random_graph(
    num_targets: list[int], num_states: list[int], *, seed: int = 0, scale: float = 1.0, kind: str = "dense"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """match [B, N, L] and transitions [B, L, L] in fp64 with their sizes; entries outside a graph are noise."""
    generator = torch.Generator().manual_seed(seed)
    count, targets, states = len(num_targets), max(num_targets), max(num_states)
    match = torch.randn(count, targets, states, generator=generator, dtype=torch.float64) * scale - 1
    scores = torch.randn(count, states, states, generator=generator, dtype=torch.float64) * scale
    place = torch.arange(states)
    allowed = place[:, None] < place
    if kind == "sparse":
        allowed &= place <= place[:, None] + 2
    moves = scores.masked_fill(~allowed, -math.inf).log_softmax(-1).nan_to_num(nan=-math.inf)
    return match, moves.masked_fill(~allowed, -math.inf), torch.tensor(num_targets), torch.tensor(num_states)
