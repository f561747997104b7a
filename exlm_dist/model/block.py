"""One Transformer block, and the norm that closes the stack."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from exlm_dist.config.schema import ModelConfig
from exlm_dist.kernels.attention import rotary_angles
from exlm_dist.kernels.elementwise import add_norm
from exlm_dist.model.attention import SelfAttention
from exlm_dist.model.dropout import block_site, dropout_add
from exlm_dist.model.feedforward import FeedForward
from exlm_dist.model.stream import Stream
from exlm_dist.parallel.region import UNSHARDED, Sharding, TensorRegion

NORM_EPS = 1e-5


class Block(nn.Module):
    """Attention and feed-forward, each with a residual; LayerNorm before each (pre) or after each sum (post).

    The `last` block of a model attends with all tokens but goes on with the states only, unless the stream forbids it:
    the output layer reads nothing else, and most of the block's work lies behind the attention.
    """

    tensor_sharding: ClassVar[dict[str, Sharding]] = {"attention_norm": "token", "ffn_norm": "token"}
    region: TensorRegion = UNSHARDED

    def __init__(self, config: ModelConfig, layer: int, backend: str, *, last: bool = False) -> None:
        super().__init__()
        self.attention_norm = AddNorm(config.width, backend)
        self.attention = SelfAttention(
            config.width, config.heads, config.attention_dropout, layer=layer, backend=backend
        )
        self.ffn_norm = AddNorm(config.width, backend)
        self.ffn = FeedForward(config.width, config.ffn)
        self.pre_norm = config.norm == "pre"
        self.rotary = config.rotary
        self.probability = config.dropout
        self.layer = layer
        self.backend = backend
        self.last = last

    def forward(self, stream: Stream) -> Stream:
        """Replace `hidden` [T, D]; the first block of a stage also fills `angles`."""
        if stream.angles is None:
            angles = rotary_angles(stream.position, stream.clone, self.attention.head_width, self.rotary)
            stream = stream.replace(angles=angles)
        rows = stream.state_index if self.last and stream.select else None
        hidden = stream.hidden
        if self.pre_norm:
            hidden, normed = self.attention_norm(hidden)
            branch = self.attention(normed, stream, rows)
            hidden = hidden if rows is None else self.region.take_rows(hidden, rows)
            hidden, normed = self.ffn_norm(hidden, branch, **self._dropout(stream, "attention", hidden))
            branch = self.ffn(normed)
            hidden = dropout_add(branch, hidden, **self._dropout(stream, "ffn", hidden), backend=self.backend)
        else:
            branch = self.attention(hidden, stream, rows)
            hidden = hidden if rows is None else self.region.take_rows(hidden, rows)
            _, hidden = self.attention_norm(hidden, branch, **self._dropout(stream, "attention", hidden))
            _, hidden = self.ffn_norm(hidden, self.ffn(hidden), **self._dropout(stream, "ffn", hidden))
        return stream.replace(hidden=hidden, selected=rows is not None)

    def _dropout(self, stream: Stream, site: str, hidden: Tensor) -> dict[str, Any]:
        """Probability and key of the dropout at `site`, and the first row of `hidden` in the micro-batch."""
        return {
            "probability": self.probability if self.training else 0.0,
            "seed": stream.dropout_seed,
            "site": block_site(self.layer, site),
            "first_row": self.region.first_row(len(hidden)),
        }


class AddNorm(nn.LayerNorm):
    """LayerNorm of `residual + dropout(branch)`."""

    def __init__(self, width: int, backend: str) -> None:
        super().__init__(width, eps=NORM_EPS)
        self.backend = backend

    def forward(
        self,
        residual: Tensor,
        branch: Tensor | None = None,
        probability: float = 0.0,
        seed: int | Tensor = 0,
        site: int = 0,
        first_row: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(the sum, its norm), [T, D] each; see `kernels.elementwise.add_norm`."""
        key = {"dropout": probability, "seed": seed, "site": site, "first_row": first_row, "backend": self.backend}
        return add_norm(branch, residual, self.weight, self.bias, eps=self.eps, **key)


class FinalNorm(nn.LayerNorm):
    """LayerNorm after the last block, also in the post-norm form (which the authors' code normalises twice)."""

    tensor_sharding: ClassVar[dict[str, Sharding]] = {"weight": "token", "bias": "token"}

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, stream: Stream) -> Stream:
        """Replace `hidden` [T, D]."""
        return stream.replace(hidden=super().forward(stream.hidden))
