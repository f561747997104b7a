from __future__ import annotations

import torch
from packed import make_batch

from exlm_dist.model.stream import Stream


def test_expanded_index_counts_from_the_own_start():
    batch = make_batch([5, 9, 7], states=4, bucket=16)
    stream = Stream.from_batch(batch)
    tokens = torch.arange(batch.num_tokens)
    expected = torch.cat([torch.arange(int(n)) for n in stream.cu_tokens.diff()])
    assert torch.equal(stream.expanded_index(tokens), expected)
    states = stream.state_index[: batch.num_states]
    assert torch.equal(stream.expanded_index(states), expected[states])


def test_padded_lays_each_sequence_on_its_own_row():
    stream = Stream.from_batch(make_batch([5, 9, 7], states=2, bucket=16))
    rows = stream.padded(stream.target_ids, stream.cu_targets, stream.max_targets, -1)
    assert rows.shape == (3, stream.max_targets)
    for b, count in enumerate(stream.num_targets.tolist()):
        first = int(stream.cu_targets[b])
        assert torch.equal(rows[b, :count], stream.target_ids[first : first + count])
        assert (rows[b, count:] == -1).all()


def test_padded_keeps_further_dimensions():
    stream = Stream.from_batch(make_batch([5, 9], states=2))
    values = torch.randn(len(stream.state_index), 3)
    rows = stream.padded(values, stream.cu_states, stream.max_states, 0.0)
    assert rows.shape == (2, stream.max_states, 3)
    assert torch.equal(rows[1, : int(stream.num_states[1])], values[int(stream.cu_states[1]) :])
