"""The same ExLM written the obvious way: padded, every intermediate materialised, autograd throughout. The baseline of
`train_cpu.py` and `step.py`; it has no computation in common with the package.

Letters: B sequences, n longest expanded length, D width, H heads, P head width, N longest target count, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMPOSSIBLE = -1e30


@dataclass(frozen=True)
class PaddedBatch:
    """ids, position, clone [B, n]; inside, is_state [B, n] bool; targets [B, N]; num_targets [B]; last [B] index of the
    last state.
    """

    ids: Tensor
    position: Tensor
    clone: Tensor
    inside: Tensor
    targets: Tensor
    num_targets: Tensor
    last: Tensor

    @property
    def is_state(self) -> Tensor:
        return self.clone > 0

    @staticmethod
    def from_packed(batch, pad: int = 1) -> PaddedBatch:
        """The same sequences as a packed batch (numpy), one per row."""

        def rows(values, starts, fill):
            parts = [torch.from_numpy(values[a:b].copy()) for a, b in zip(starts[:-1], starts[1:])]
            return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)

        clone = rows(batch.clone, batch.cu_tokens, -1)
        index = torch.arange(clone.shape[1])
        return PaddedBatch(
            ids=rows(batch.input_ids, batch.cu_tokens, pad),
            position=rows(batch.position, batch.cu_tokens, 0),
            clone=clone.clamp(min=0),
            inside=clone >= 0,
            targets=rows(batch.target_ids, batch.cu_targets, pad),
            num_targets=torch.from_numpy(batch.cu_targets).diff(),
            last=torch.where(clone > 0, index, -1).amax(1),
        )

    def to(self, device: torch.device) -> PaddedBatch:
        return PaddedBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.dropout = heads, dropout

    def forward(self, x: Tensor, batch: PaddedBatch) -> Tensor:
        count, length, width = x.shape
        q, k, v = self.qkv(x).view(count, length, self.heads, 3, -1).permute(3, 0, 2, 1, 4)  # [B, H, n, P] each
        cos, sin = rotary_table(batch, q.shape[-1])
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        inside = batch.inside[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        if x.is_cuda:  # torch's fused attention; with dropout it has none for a CPU
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=inside, dropout_p=dropout)
        else:
            scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~inside, -math.inf)
            mixed = F.dropout(scores.softmax(-1), dropout) @ v
        return self.out(mixed.transpose(1, 2).reshape(count, length, width))


def rotary_table(batch: PaddedBatch, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, n, P] of the two-dimensional rotary positions."""
    frequency = 10000.0 ** (-torch.arange(0, width // 2, 2, device=batch.ids.device) / (width // 2))
    angles = torch.cat([batch.position[..., None] * frequency, batch.clone[..., None] * frequency], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.ffn = nn.ModuleDict({"up": nn.Linear(width, ffn), "down": nn.Linear(ffn, width)})
        self.dropout = dropout

    def forward(self, x: Tensor, batch: PaddedBatch) -> Tensor:
        x = x + F.dropout(self.attention(self.attention_norm(x), batch), self.dropout, self.training)
        inner = self.ffn["down"](F.gelu(self.ffn["up"](self.ffn_norm(x))))
        return x + F.dropout(inner, self.dropout, self.training)


class TransitionHead(nn.Module):
    def __init__(self, width: int, heads: int, max_positions: int, prior: tuple[float, float] | None) -> None:
        super().__init__()
        self.positions = nn.Embedding(max_positions, width)
        self.query, self.key = nn.Linear(2 * width, width), nn.Linear(2 * width, width)
        self.gate = nn.Linear(2 * width, heads)
        self.heads, self.prior = heads, prior

    def forward(self, features: Tensor, batch: PaddedBatch) -> Tensor:
        """Log-probabilities [B, n, n] from every state to every later one."""
        count, length, width = features.shape
        position = self.positions(torch.arange(length, device=features.device)).expand(count, -1, -1)
        x = torch.cat([features, position], dim=-1)
        query = self.query(x).view(count, length, self.heads, -1)
        key = self.key(x).view(count, length, self.heads, -1)
        scores = torch.einsum("bihp,bjhp->bijh", query, key) / math.sqrt(width // self.heads)  # [B, n, n, H]
        if self.prior is not None:
            group, (scale, floor) = (batch.clone == 1).cumsum(1), self.prior
            excess = (group[:, None, :] - group[:, :, None] - 1).abs()
            scores = scores - (excess / scale).clamp(max=floor)[..., None]
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        allowed = later & batch.is_state[:, :, None] & batch.is_state[:, None, :]
        scores = scores.masked_fill(~allowed[..., None], IMPOSSIBLE).log_softmax(dim=2)
        gates = self.gate(x).log_softmax(-1)[:, :, None, :]
        return torch.logsumexp(scores + gates, dim=-1).masked_fill(~allowed, IMPOSSIBLE)


class Output(nn.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        vocabulary: int,
        max_positions: int,
        prior: tuple[float, float] | None,
        weight: nn.Parameter,
    ) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.weight, self.bias = weight, nn.Parameter(torch.zeros(vocabulary))
        self.transition = TransitionHead(width, heads, max_positions, prior)

    def forward(self, features: Tensor, batch: PaddedBatch) -> Tensor:
        """log P of the targets of each row, [B]."""
        logits = F.linear(self.norm(F.gelu(self.dense(features))), self.weight, self.bias)  # [B, n, V]
        index = batch.targets[:, None, :].expand(-1, logits.shape[1], -1)
        match = logits.log_softmax(-1).gather(2, index).transpose(1, 2)  # [B, N, n]
        return path_sum(match, self.transition(features, batch), batch)


def path_sum(match: Tensor, transitions: Tensor, batch: PaddedBatch) -> Tensor:
    """The forward recursion over all positions; every path starts at position 0 and ends at the last state."""
    alpha = torch.full_like(match[:, 0], IMPOSSIBLE)
    alpha = torch.cat([match[:, 0, :1], alpha[:, 1:]], dim=1)
    rows = [alpha]
    for i in range(1, match.shape[1]):
        rows.append(torch.logsumexp(rows[-1][:, :, None] + transitions, dim=1) + match[:, i])
    sequence = torch.arange(len(match), device=match.device)
    return torch.stack(rows, dim=1)[sequence, batch.num_targets - 1, batch.last]


class StraightforwardExLM(nn.Module):
    """Pre-norm ExLM with dense transitions, anchors and a tied token head; parameters as in the package.

    `prior`: width and floor of the prior over jumps in groups of states, if there is one.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        ffn: int,
        vocabulary: int,
        max_positions: int,
        prior: tuple[float, float] | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, ffn, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = Output(width, heads, vocabulary, max_positions, prior, self.embedding.weight)
        self.dropout = dropout

    @classmethod
    def of(cls, config, vocabulary: int, dropout: float) -> StraightforwardExLM:
        """The twin of the package's model with these settings."""
        priors = {"none": None, "group": (config.jump_width, config.jump_floor)}
        sizes = (config.layers, config.width, config.heads, config.ffn, vocabulary, config.max_positions)
        return cls(*sizes, priors[config.jump_prior], dropout)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Mean over the sequences of -log P / number of targets."""
        x = F.dropout(self.embedding(batch.ids), self.dropout, self.training)
        for block in self.blocks:
            x = block(x, batch)
        return -(self.output(self.norm(x), batch) / batch.num_targets).mean()
