"""Rotary angles of a packed batch: one row per token, shared by all layers."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10000.0


def rotary_angles(position: Tensor, clone: Tensor, width: int, kind: str = "2d") -> Tensor:
    """Angles [T, width/2] fp32 for head width `width`.

    position [T]: position in the unexpanded sequence; clone [T]: 0 for ordinary tokens, 1..k for states.
    "2d": [position * f_0..f_{width/4-1}, clone * f_0..] with f_j = 10000^(-2j/(width/2)).
    "1d": position in the token's own expanded sequence times f_j = 10000^(-2j/width), j < width/2; a sequence begins
    at each token of position 0 that is ordinary or a first clone.
    ValueError for an unknown kind or a width that does not divide.
    """
    divisor = {"2d": 4, "1d": 2}.get(kind)
    if divisor is None:
        raise ValueError(f"kind is {kind!r}, expected '2d' or '1d'")
    if width % divisor:
        raise ValueError(f"head width {width} must be divisible by {divisor} for {kind} rotary positions")
    if position.shape != clone.shape or position.dim() != 1:
        raise ValueError(f"position {list(position.shape)} and clone {list(clone.shape)} must both be [T]")
    if kind == "1d":
        return _expanded_positions(position, clone).float()[:, None] * _frequencies(width, position.device)
    frequencies = _frequencies(width // 2, position.device)
    return torch.cat([position.float()[:, None] * frequencies, clone.float()[:, None] * frequencies], dim=-1)


def _frequencies(size: int, device: torch.device) -> Tensor:
    """10000^(-2j/size) for j < size/2, rounded once to fp32."""
    exponent = torch.arange(0, size, 2, dtype=torch.float64, device=device) / size
    return (BASE**-exponent).float()


def _expanded_positions(position: Tensor, clone: Tensor) -> Tensor:
    """Position of each token in its own expanded sequence, from where the sequences start."""
    index = torch.arange(len(position), device=position.device)
    starts = (position == 0) & (clone <= 1)
    return index - torch.where(starts, index, 0).cummax(0).values
