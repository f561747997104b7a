"""Packed rows to padded [B, L, ...] arrays and back, without host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Which packed row is at which position of a padded [B, longest] array."""

    count: int
    longest: int
    rows: Tensor  # [B, longest] packed row; positions past a sequence's end have its first row
    valid: Tensor  # [B, longest] bool

    @classmethod
    def of(cls, starts: Tensor, longest: int, total: int) -> Segments:
        """From cumulative lengths [B+1] of `total` packed rows, the longest sequence being `longest`."""
        position = torch.arange(longest, device=starts.device)
        rows = starts[:-1, None] + position
        valid = rows < starts[1:, None]
        first = starts[:-1, None].clamp(max=max(total - 1, 0))
        return cls(len(starts) - 1, longest, torch.where(valid, rows, first), valid)

    def pad(self, packed: Tensor) -> Tensor:
        """[B, longest, ...] of packed [R, ...]; zero past a sequence's end."""
        mask = self.valid.reshape(*self.valid.shape, *[1] * (packed.dim() - 1))
        return packed[self.rows].masked_fill(~mask, 0)

    def pack(self, padded: Tensor, total: int) -> Tensor:
        """[total, ...] of padded [B, longest, ...]; zero in rows that no sequence owns."""
        out = padded.new_zeros((total + 1, *padded.shape[2:]))
        out[torch.where(self.valid, self.rows, total)] = padded
        return out[:total]

    def part(self, first: int, last: int) -> Segments:
        """Sequences first..last-1, still with the rows of the whole packed array."""
        return Segments(last - first, self.longest, self.rows[first:last], self.valid[first:last])
