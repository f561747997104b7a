"""A batch of state graphs, and the forward variables of a run over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exlm_dist.kernels.checks import work_dtype

NEVER = float("-inf")


@dataclass(frozen=True)
class Graph:
    """Inputs in the working type, with what the recursions need to know of the sizes."""

    match: Tensor  # [B, N, L]
    moves: Tensor  # [B, L, L], -inf unless v < u
    num_targets: Tensor  # [B]
    num_states: Tensor  # [B]
    ends: int
    slack: int  # no sequence has more than this many states beyond its targets

    @classmethod
    def of(cls, match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, ends: int) -> Graph:
        """From the arguments of the public functions."""
        dtype, states = work_dtype(match), match.shape[2]
        place = torch.arange(states, device=match.device)
        moves = transitions.to(dtype).masked_fill(place[:, None] >= place, NEVER)
        on_cpu = match.device.type == "cpu"  # elsewhere reading the lengths would wait for the device
        slack = max(0, int((num_states - num_targets).max())) if on_cpu else states
        return cls(match.to(dtype), moves, num_targets, num_states, ends, slack)

    def take(self, index: Tensor) -> Graph:
        """The sequences `index` [b] of the batch."""
        sizes = self.num_targets[index], self.num_states[index]
        return Graph(self.match[index], self.moves[index], *sizes, self.ends, self.slack)

    def window(self, i: int) -> slice:
        """States that target i of any sequence can sit on."""
        states = self.match.shape[2]
        return slice(min(i, states), min(i + self.slack + 1, states))

    def band(self, i: int) -> Tensor:
        """[B, L] bool: states that target i can sit on, `i <= u <= L_b - N_b + i`; none for i >= N_b."""
        place = torch.arange(self.match.shape[2], device=self.match.device)
        last = (self.num_states - self.num_targets)[:, None] + i
        return (place >= i) & (place <= last) & (self.num_targets > i)[:, None]

    def finals(self) -> Tensor:
        """[B, L] bool: the last `ends` states of each sequence."""
        place = torch.arange(self.match.shape[2], device=self.match.device)
        stop = self.num_states[:, None]
        return (place < stop) & (place >= stop - self.ends)

    def starts(self) -> Tensor:
        """Log-probability [B, L] of starting at each state: 1/ends for the first `ends`."""
        row = torch.full_like(self.match[:, 0], NEVER)
        row[:, : self.ends] = -torch.log(torch.tensor(float(self.ends), dtype=torch.float64)).to(row.dtype)
        return row

    def least_move(self) -> Tensor:
        """[B] log-probability of the least likely move v -> u, v < u, between a sequence's own states."""
        place = torch.arange(self.match.shape[2], device=self.match.device)
        own = (place[:, None] < place) & (place < self.num_states[:, None])[:, None, :]
        return self.moves.masked_fill(~own, 0).amin((1, 2))

    def last(self, rows: Tensor) -> Tensor:
        """Row of each sequence's last target of `rows` [B, N, L], at its final states only (-inf elsewhere)."""
        index = (self.num_targets - 1)[:, None, None].expand(-1, 1, rows.shape[2])
        return rows.gather(1, index)[:, 0].masked_fill(~self.finals(), NEVER)


@dataclass(frozen=True)
class Alphas:
    """Forward variables in fp64: sums over thousands of nats keep their small differences."""

    values: Tensor  # [B, N, L] log-probability of the targets 0..i, the last of them on state u
    arrivals: Tensor  # [B, N, L] the same without the match of target i
    linear: Tensor  # [B] bool: sequences that were done with plain probabilities
