"""The first layer: token ids to vectors."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exlm_dist.model.dropout import EMBEDDING_SITE, dropout
from exlm_dist.model.stream import Stream
from exlm_dist.parallel.region import UNSHARDED, Sharding, TensorRegion

#: Fraction of masked tokens that the authors' token dropout assumes in training (mask 0.15, of which 0.8 are `<mask>`).
_TRAINED_FRACTION = 0.15 * 0.8


class Embedding(nn.Module):
    """Embedding rows of the tokens, with dropout; no position embedding, no scale and no norm (as the authors').

    `token_dropout` is the id of `<mask>` where the authors' switch of that name is wanted: in training the vectors of
    `<mask>` become 0 and the others are scaled by (1 - 0.12) / (1 - fraction of `<mask>` in the expanded sequence).
    """

    tensor_sharding: ClassVar[dict[str, Sharding]] = {"weight": "embedding"}
    region: TensorRegion = UNSHARDED

    def __init__(
        self,
        vocab_size: int,
        width: int,
        probability: float,
        token_dropout: int | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.probability = probability
        self.token_dropout = token_dropout
        self.backend = backend

    def forward(self, stream: Stream) -> Stream:
        """Fill `hidden` [T, D]."""
        stream = stream.aligned(self.region.row_multiple)
        hidden = self.region.embed(stream.input_ids, self.weight)
        first = self.region.first_row(len(hidden))
        if self.training and self.token_dropout is not None:
            hidden = hidden * self._token_scale(stream)[first : first + len(hidden), None]
        if self.training:
            key = (stream.dropout_seed, EMBEDDING_SITE)
            hidden = dropout(hidden, self.probability, *key, first, backend=self.backend)
        return stream.replace(hidden=hidden)

    def _token_scale(self, stream: Stream) -> Tensor:
        """Factor of each token's vector, [T]; padding tokens take that of the last sequence."""
        masked = stream.input_ids == self.token_dropout
        before = F.pad(masked.cumsum(0), (1, 0))
        count = before[stream.cu_tokens[1:]] - before[stream.cu_tokens[:-1]]
        scale = (1 - _TRAINED_FRACTION) / (1 - count / stream.cu_tokens.diff())
        tokens = torch.arange(len(masked), device=masked.device)
        sequence = torch.bucketize(tokens, stream.cu_tokens[1:], right=True).clamp(max=stream.num_sequences - 1)
        return torch.where(masked, 0.0, scale[sequence]).to(self.weight.dtype)
