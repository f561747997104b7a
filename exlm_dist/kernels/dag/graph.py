"""A batch of state graphs, and the forward variables of the recursion over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exlm_dist.kernels.checks import work_dtype

NEVER = float("-inf")


@dataclass(frozen=True)
class Graph:
    """The inputs in the working type, and the sizes that the recursions need."""

    match: Tensor  # [B, N, L]
    transitions: Tensor  # [B, L, L], -inf unless v < u
    num_targets: Tensor  # [B]
    num_states: Tensor  # [B]
    ends: int
    slack: int  # no sequence has more than this many states beyond its targets

    @classmethod
    def of(cls, match: Tensor, transitions: Tensor, num_targets: Tensor, num_states: Tensor, ends: int) -> Graph:
        """From the arguments of the public functions."""
        dtype, states = work_dtype(match), match.shape[2]
        index = torch.arange(states, device=match.device)
        transitions = transitions.to(dtype).masked_fill(index[:, None] >= index, NEVER)
        on_cpu = match.device.type == "cpu"  # elsewhere reading the lengths would wait for the device
        slack = max(0, int((num_states - num_targets).max())) if on_cpu else states
        return cls(match.to(dtype), transitions, num_targets, num_states, ends, slack)

    def take(self, index: Tensor) -> Graph:
        """The sequences `index` [b] of the batch."""
        sizes = self.num_targets[index], self.num_states[index]
        return Graph(self.match[index], self.transitions[index], *sizes, self.ends, self.slack)

    def window(self, i: int) -> slice:
        """The states that target i of any sequence can sit on."""
        states = self.match.shape[2]
        return slice(min(i, states), min(i + self.slack + 1, states))

    def band(self, i: int) -> Tensor:
        """[B, L] bool: the states that target i can sit on, `i <= u <= L_b - N_b + i`; none for i >= N_b."""
        index = torch.arange(self.match.shape[2], device=self.match.device)
        last = (self.num_states - self.num_targets)[:, None] + i
        return (index >= i) & (index <= last) & (self.num_targets > i)[:, None]

    def finals(self) -> Tensor:
        """[B, L] bool: the last `ends` states of each sequence."""
        index = torch.arange(self.match.shape[2], device=self.match.device)
        stop = self.num_states[:, None]
        return (index < stop) & (index >= stop - self.ends)

    def starts(self) -> Tensor:
        """Log-probability [B, L] of starting at each state: that of 1/ends for the first `ends`."""
        row = torch.full_like(self.match[:, 0], NEVER)
        row[:, : self.ends] = -torch.log(torch.tensor(float(self.ends), dtype=torch.float64)).to(row.dtype)
        return row

    def least_transition(self) -> Tensor:
        """[B] log-probability of the least likely transition v -> u, v < u, between a sequence's own states."""
        index = torch.arange(self.match.shape[2], device=self.match.device)
        own = (index[:, None] < index) & (index < self.num_states[:, None])[:, None, :]
        return self.transitions.masked_fill(~own, 0).amin((1, 2))

    def last(self, rows: Tensor) -> Tensor:
        """The row of each sequence's last target in `rows` [B, N, L], at its final states only (-inf elsewhere)."""
        index = (self.num_targets - 1)[:, None, None].expand(-1, 1, rows.shape[2])
        return rows.gather(1, index)[:, 0].masked_fill(~self.finals(), NEVER)


@dataclass(frozen=True)
class Alphas:
    """Forward variables in fp64: sums of thousands of nats keep their small differences."""

    values: Tensor  # [B, N, L] log-probability of targets 0..i with the last of them on state u
    arrivals: Tensor  # [B, N, L] the same without the match of target i
    linear: Tensor  # [B] bool: sequences computed with plain probabilities
