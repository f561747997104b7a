"""One Transformer block, and the norm that closes the stack."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from exlm_dist.config.schema import ModelConfig
from exlm_dist.kernels.attention import rotary_angles
from exlm_dist.model.attention import SelfAttention
from exlm_dist.model.dropout import dropout_add, site_seed
from exlm_dist.model.feedforward import FeedForward
from exlm_dist.model.stream import Stream

NORM_EPS = 1e-5


class Block(nn.Module):
    """Attention and feed-forward, each with a residual; LayerNorm before each (pre) or after each sum (post).

    The `last` block of a model attends with all tokens but goes on with the states only, unless the stream forbids it:
    the output layer reads nothing else, and most of the block's work lies behind the attention.
    """

    def __init__(self, config: ModelConfig, layer: int, backend: str, *, last: bool = False) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attention = SelfAttention(
            config.width, config.heads, config.attention_dropout, layer=layer, backend=backend
        )
        self.ffn_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.ffn = FeedForward(config.width, config.ffn)
        self.pre_norm = config.norm == "pre"
        self.rotary = config.rotary
        self.probability = config.dropout
        self.layer = layer
        self.last = last

    def forward(self, stream: Stream) -> Stream:
        """Replace `hidden` [T, D]; the first block of a stage also fills `angles`."""
        if stream.angles is None:
            angles = rotary_angles(stream.position, stream.clone, self.attention.head_width, self.rotary)
            stream = stream.replace(angles=angles)
        rows = stream.state_index if self.last and stream.select else None
        hidden = stream.hidden
        branch = self.attention(self.attention_norm(hidden) if self.pre_norm else hidden, stream, rows)
        hidden = hidden if rows is None else F.embedding(rows, hidden)
        if self.pre_norm:
            hidden = self._add(branch, hidden, stream, "attention")
            hidden = self._add(self.ffn(self.ffn_norm(hidden)), hidden, stream, "ffn")
        else:
            hidden = self.attention_norm(self._add(branch, hidden, stream, "attention"))
            hidden = self.ffn_norm(self._add(self.ffn(hidden), hidden, stream, "ffn"))
        return stream.replace(hidden=hidden, selected=rows is not None)

    def _add(self, branch: Tensor, residual: Tensor, stream: Stream, site: str) -> Tensor:
        probability = self.probability if self.training else 0.0
        return dropout_add(branch, residual, probability, site_seed(stream.dropout_seed, self.layer, site))


class FinalNorm(nn.LayerNorm):
    """LayerNorm after the last block, also in the post-norm form (which the authors' code normalises twice)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, stream: Stream) -> Stream:
        """Replace `hidden` [T, D]."""
        return stream.replace(hidden=super().forward(stream.hidden))
