"""Unmasked token sequences to packed micro-batches of similar lengths, and the encoder's hidden states for them.

A sequence without masks has no states: nothing is expanded, not even BOS and EOS (docs/finetuning-protocol.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from exlm_dist.data.expansion import expand, wrap
from exlm_dist.data.masking import Masks
from exlm_dist.data.packing import pack
from exlm_dist.model.build import LanguageModel, run_layers
from exlm_dist.model.stream import Stream


def length_batches(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Indices of the sequences of each micro-batch, longest first: at most `max_tokens` tokens (BOS and EOS counted),
    or a single longer sequence. `lengths` int64 [m] without BOS and EOS."""
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order] + 2)
    first = done = 0
    while first < len(order):
        last = max(first + 1, int(np.searchsorted(ends, done + max_tokens, side="right")))
        yield order[first:last]
        first, done = last, int(ends[last - 1])


def take_sequences(tokens: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, lengths) of the `chosen` sequences of a ragged batch, in that order."""
    starts = np.cumsum(lengths) - lengths
    counts = lengths[chosen]
    before = np.cumsum(counts) - counts
    index = np.arange(counts.sum()) + np.repeat(starts[chosen] - before, counts)
    return tokens[index], counts


def unmasked_stream(
    tokens: np.ndarray, lengths: np.ndarray, device: torch.device | str = "cpu", dropout_seed: int = 0
) -> Stream:
    """Stream of a ragged batch without masks: BOS and EOS around each sequence, no states, no targets."""
    count = len(lengths)
    masks = Masks(np.zeros(0, np.int64), np.zeros(count, np.int64), np.zeros(0, np.int64))
    expanded = expand(wrap(tokens, lengths, masks, anchors=False), states=1)
    nobody = np.full(count, -1)
    batch = pack(expanded, 0, count, states=1, bucket=1, sample_ids=nobody, epochs=nobody, step=0, index=0)
    return Stream.from_batch(batch, device, dropout_seed)


def hidden_states(model: LanguageModel, stream: Stream, layer: int | None = None) -> Tensor:
    """Hidden state of every token, [T, D]: after the final norm, or those that `layer` (0: the embeddings, i: block i)
    passes on. Dropout acts in training mode only; gradients flow."""
    layers = model.layers[:-1] if layer is None else model.layers[: layer + 1]
    recompute = model.activation_checkpointing and model.training
    hidden = run_layers(layers, stream.replace(select=False), recompute=recompute).hidden
    assert hidden is not None  # the embedding has filled it
    return hidden
