"""Packed rows and padded [B, L, ...] arrays, to and fro, without host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Where packed row r of a padded [B, longest] array lives, and back."""

    count: int
    longest: int
    rows: Tensor  # [B, longest] packed row; places past the own end read the first row of the own sequence
    valid: Tensor  # [B, longest] bool

    @classmethod
    def of(cls, starts: Tensor, longest: int, total: int) -> Segments:
        """From cumulative lengths [B+1] of `total` packed rows, the longest sequence being `longest`."""
        place = torch.arange(longest, device=starts.device)
        rows = starts[:-1, None] + place
        valid = rows < starts[1:, None]
        first = starts[:-1, None].clamp(max=max(total - 1, 0))
        return cls(len(starts) - 1, longest, torch.where(valid, rows, first), valid)

    def pad(self, packed: Tensor) -> Tensor:
        """[B, longest, ...] of packed [R, ...]; zero past the own end."""
        mask = self.valid.reshape(*self.valid.shape, *[1] * (packed.dim() - 1))
        return packed[self.rows].masked_fill(~mask, 0)

    def pack(self, padded: Tensor, total: int) -> Tensor:
        """[total, ...] of padded [B, longest, ...]; zero in rows that no sequence owns."""
        out = padded.new_zeros((total + 1, *padded.shape[2:]))
        out[torch.where(self.valid, self.rows, total)] = padded
        return out[:total]

    def part(self, first: int, last: int) -> Segments:
        """Sequences first..last-1, still of the whole packed array."""
        return Segments(last - first, self.longest, self.rows[first:last], self.valid[first:last])
