"""Small packed batches through the package's own masking, expansion and packing, and what makes a batch valid."""

from __future__ import annotations

import numpy as np

from exlm_dist.data.batch import PackedBatch
from exlm_dist.data.expansion import expand, wrap
from exlm_dist.data.masking import mask_batch, sample_keys
from exlm_dist.data.packing import pack
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL, PAD


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
    """Random sequences with payloads of `lengths` tokens; a sequence depends on its length and index alone."""
    tokens = [np.random.default_rng((seed, i)).integers(NUM_SPECIAL, vocab_size, n) for i, n in enumerate(lengths)]
    samples, epochs = np.arange(len(lengths)), np.zeros(len(lengths), np.int64)
    flat, sizes = np.concatenate(tokens), np.array(lengths)
    masks = mask_batch(flat, sizes, sample_keys(seed, epochs, samples), ratio=ratio, vocab_size=vocab_size)
    expanded = expand(wrap(flat, sizes, masks, anchors), states)
    return pack(
        expanded, 0, len(lengths), states=states, bucket=bucket, sample_ids=samples, epochs=epochs, step=0, index=0
    )


def check_batch(batch: PackedBatch) -> None:
    """Raise AssertionError, naming the rule, if `batch` breaks what the model relies on."""
    arrays = {name: value for name, value in vars(batch).items() if isinstance(value, np.ndarray)}
    for name, array in arrays.items():
        assert array.dtype == (bool if name == "is_masked" else np.int64) and array.flags.c_contiguous, name
    for name in ("cu_tokens", "cu_states", "cu_targets"):
        bounds = arrays[name]
        assert bounds[0] == 0 and (np.diff(bounds) > 0).all() and len(bounds) == batch.num_sequences + 1, name
    assert (batch.cu_states == batch.states * batch.cu_targets).all(), "k states per target"
    assert len(batch.input_ids) == len(batch.position) == len(batch.clone) >= batch.num_tokens, "tokens"
    assert len(batch.target_ids) == len(batch.is_masked) >= batch.num_targets, "targets"
    assert len(batch.state_index) >= batch.num_states, "states"
    tokens, states, targets = batch.num_tokens, batch.num_states, batch.num_targets
    assert (batch.input_ids[tokens:] == PAD).all() and (batch.target_ids[targets:] == PAD).all(), "padding ids"
    assert not batch.is_masked[targets:].any() and not batch.state_index[states:].any(), "padding of targets and states"
    assert not batch.position[tokens:].any() and not batch.clone[tokens:].any(), "padding of positions and clones"
    _check_states(batch)


def _check_states(batch: PackedBatch) -> None:
    """The states are exactly the tokens with a clone number, k per target, within their own sequence."""
    states = batch.state_index[: batch.num_states]
    assert np.array_equal(states, np.flatnonzero(batch.clone)), "states ascend and are the tokens with a clone number"
    clones = np.arange(1, batch.states + 1)
    assert (batch.clone[states].reshape(-1, batch.states) == clones).all(), "clones 1..k"
    assert (np.searchsorted(states, batch.cu_tokens) == batch.cu_states).all(), "states lie in their own sequence"
    positions = batch.position[states].reshape(-1, batch.states)
    assert (positions == positions[:, :1]).all(), "clones of one token have its position"
    starts = batch.cu_tokens[:-1]
    steps = np.diff(batch.position[: batch.num_tokens])
    inside = np.ones(max(0, batch.num_tokens - 1), bool)
    inside[starts[1:] - 1] = False
    assert (batch.position[starts] == 0).all(), "positions start at 0"
    assert ((steps == 0) | (steps == 1))[inside].all(), "positions count up"
