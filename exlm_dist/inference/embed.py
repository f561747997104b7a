"""Embeddings: one vector for each text or molecule, pooled from the hidden states of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from exlm_dist.inference.loading import LoadedCheckpoint
from exlm_dist.inference.sequences import hidden_states, length_batches, take_sequences, unmasked_stream
from exlm_dist.inference.side_by_side import on_cores
from exlm_dist.model.stream import Stream
from exlm_dist.tokenizers.encoding import EncodedTexts, encode_texts
from exlm_dist.utils.errors import ConfigError

POOLINGS = ("mean", "first", "max")
#: Tokens of a micro-batch, by the type of the device.
BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True)
class Embeddings:
    """Vectors of n texts, fp32 [n, D]; NaN for a text that failed. `failures`: index -> reason."""

    vectors: np.ndarray
    failures: dict[int, str]
    unknown: int = 0  # texts with a token that the vocabulary lacks
    truncated: int = 0  # texts of which the end was cut off


def embed_texts(
    loaded: LoadedCheckpoint,
    texts: Sequence[str | None],
    *,
    pooling: str = "mean",
    layer: int | None = None,
    truncate: bool = False,
) -> Embeddings:
    """Embed `texts`, in their order.

    pooling: 'mean' over all tokens, BOS and EOS included (as the mean pooling that is usual with the transformers
    library), 'first' (BOS), or 'max' of each dimension. layer: 0 for the token embeddings, i for the output of block
    i, None for the last one behind the final norm. ConfigError for others.
    """
    check_pooling(loaded, pooling, layer)
    encoded = encode_texts(loaded.tokenizer, texts, max_tokens=loaded.max_tokens, truncate=truncate)
    vectors = np.full((len(texts), loaded.config.model.width), np.nan, np.float32)
    vectors[encoded.rows] = embed_encoded(loaded, encoded, pooling, layer)
    return Embeddings(vectors, encoded.failures, encoded.unknown, encoded.truncated)


def embed_encoded(loaded: LoadedCheckpoint, encoded: EncodedTexts, pooling: str, layer: int | None) -> np.ndarray:
    """Vectors of sequences that are encoded already, fp32 [m, D]."""

    def vectors(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stream = unmasked_stream(*take_sequences(encoded.tokens, encoded.lengths, chosen), loaded.device)
        return chosen, pool(hidden_states(loaded.model, stream, layer), stream, pooling).float().cpu().numpy()

    result = np.empty((len(encoded.lengths), loaded.config.model.width), np.float32)
    batches = length_batches(encoded.lengths, BATCH_TOKENS[loaded.device.type])
    for chosen, found in on_cores(vectors, batches, loaded.device):
        result[chosen] = found
    return result


def pool(hidden: Tensor, stream: Stream, pooling: str) -> Tensor:
    """One vector per sequence, [B, D], from the hidden states [T, D]; differentiable. See `embed_texts`."""
    if pooling == "first":
        return F.embedding(stream.cu_tokens[:-1], hidden)
    lengths = stream.cu_tokens.diff()
    return torch.segment_reduce(hidden[: int(stream.cu_tokens[-1])], pooling, lengths=lengths, unsafe=True)


def check_pooling(loaded: LoadedCheckpoint, pooling: str, layer: int | None) -> None:
    """ConfigError for a pooling or a layer that does not exist."""
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling {pooling!r}: must be one of {', '.join(POOLINGS)}.")
    layers = loaded.config.model.layers
    if layer is not None and not 0 <= layer <= layers:
        raise ConfigError(f"layer {layer}: must be from 0 (token embeddings) to {layers} (the last block).")
