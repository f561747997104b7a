"""Bidirectional self-attention with rotary positions over a packed micro-batch."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from exlm_dist.kernels.attention import attention_packed
from exlm_dist.kernels.linear import BiasPassingLinear, Linear, linear_by_column
from exlm_dist.model.dropout import block_site
from exlm_dist.model.stream import Stream
from exlm_dist.parallel.region import UNSHARDED, Sharding, TensorRegion


class SelfAttention(nn.Module):
    """q, k and v of all heads from one matrix, attention within each sequence, output projection.

    The rows of `qkv` are ordered [H, 3, P], so that a contiguous slice of rows holds whole heads. Within a head of q
    and k the order is [position low | clone low | position high | clone high] (a quarter each), which makes 2-D rotary
    positions the ordinary rotate-half of P/2 pairs with one row of angles per token.
    """

    tensor_sharding: ClassVar[dict[str, Sharding]] = {"qkv": "column", "out": "row"}
    region: TensorRegion = UNSHARDED

    def __init__(self, width: int, heads: int, probability: float, *, layer: int, backend: str) -> None:
        super().__init__()
        self.qkv = QKVLinear(width, 3 * width)
        self.out = Linear(width, width)
        self.heads = heads
        self.head_width = width // heads
        self.probability = probability
        self.layer = layer
        self.backend = backend

    def forward(self, hidden: Tensor, stream: Stream, rows: Tensor | None = None) -> Tensor:
        """hidden [T, D] -> [T, D], or only `rows` of it; needs `stream.angles`."""
        qkv, bias = self.qkv(hidden)
        qkv = qkv.unflatten(1, (-1, 3, self.head_width))
        mixed = attention_packed(
            qkv,
            stream.angles,
            stream.cu_tokens,
            stream.max_tokens,
            bias=bias,
            dropout=self.probability if self.training else 0.0,
            seed=stream.dropout_seed,
            site=block_site(self.layer, "weights"),
            first_head=self.region.first_index(qkv.shape[1]),
            all_heads=self.heads,
            backend=self.backend,
        )
        mixed = mixed.flatten(1)
        return self.out(mixed if rows is None else F.embedding(rows, mixed))


class QKVLinear(BiasPassingLinear):
    """`BiasPassingLinear` whose result lies as attention on a CPU reads it."""

    product = staticmethod(linear_by_column)
