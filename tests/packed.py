"""Small packed batches through the package's own masking, expansion and packing."""

from __future__ import annotations

import numpy as np

from exlm_dist.data.batch import PackedBatch
from exlm_dist.data.expansion import expand, wrap
from exlm_dist.data.masking import mask_batch, sample_keys
from exlm_dist.data.packing import pack
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL


def make_batch(
    lengths: list[int],
    *,
    states: int = 3,
    anchors: bool = True,
    vocab_size: int = 23,
    seed: int = 0,
    bucket: int = 1,
    ratio: float = 0.3,
) -> PackedBatch:
    """Random sequences with payloads of `lengths` tokens; the same sequence for the same place in the list."""
    tokens = [np.random.default_rng((seed, i)).integers(NUM_SPECIAL, vocab_size, n) for i, n in enumerate(lengths)]
    samples, epochs = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
    flat, sizes = np.concatenate(tokens), np.array(lengths)
    masks = mask_batch(flat, sizes, sample_keys(seed, epochs, samples), ratio=ratio, vocab_size=vocab_size)
    expanded = expand(wrap(flat, sizes, masks, anchors), states)
    return pack(
        expanded, 0, len(lengths), states=states, bucket=bucket, sample_ids=samples, epochs=epochs, step=0, index=0
    )
