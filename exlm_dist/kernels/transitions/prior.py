"""A fixed prior over jumps: what is added to the score of going from state v to state u, by the two indices alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PRIORS = ("gaussian", "laplace", "group")


@dataclass(frozen=True)
class JumpPrior:
    """Favours going on by one target: by k states (d = u - v), or by one group of k (g = u // k - v // k).

    kind "gaussian": max(-floor, -(d - k)^2 / (2 width^2)); "laplace": max(-floor, -|d - k| / width), width in states;
    "group": max(-floor, -|g - 1| / width), width in groups. In nats. ValueError unless width and floor are above 0.
    """

    kind: str
    width: float
    floor: float

    def __post_init__(self) -> None:
        if self.kind not in PRIORS:
            raise ValueError(f"the prior over jumps is {self.kind!r}, expected one of {', '.join(PRIORS)}")
        if not (0 < self.width < math.inf and 0 < self.floor < math.inf):
            raise ValueError(f"width {self.width} and floor {self.floor} of the prior over jumps must be above 0")

    def bias(self, states: int, states_per_target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What is added to the scores, [v, u] of `states` states."""
        index = torch.arange(states, device=device)
        if self.kind == "group":
            index = index // states_per_target
        expected = 1 if self.kind == "group" else states_per_target
        surplus = (index - index[:, None] - expected).to(dtype)
        fall = surplus.square() / (2 * self.width**2) if self.kind == "gaussian" else surplus.abs() / self.width
        return -fall.clamp(max=self.floor)
