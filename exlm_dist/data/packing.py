"""Global batch -> micro-batches -> packed arrays. The plan depends on the lengths alone, so every rank has the same."""

from __future__ import annotations

import numpy as np

from exlm_dist.data.batch import PackedBatch
from exlm_dist.data.expansion import Expanded
from exlm_dist.tokenizers.tokenizer import PAD


def plan_micro_batches(lengths: np.ndarray, count: int) -> list[np.ndarray]:
    """Deal G sequences to `count` micro-batches whose sizes differ by at most one, with near equal sums of `lengths`.

    Longest first, in rounds of one sequence per micro-batch, the longest of a round to the lightest micro-batch so far.
    Returns the indices of each micro-batch's sequences, int64, longest first. Ties keep their order: the plan depends
    on the lengths alone.
    """
    order = np.argsort(-lengths, kind="stable")
    sums = np.zeros(count, np.int64)
    table = np.full((-(-len(order) // count), count), -1, np.int64)
    for row, first in zip(table, range(0, len(order), count)):
        dealt = order[first : first + count]
        lightest = np.argsort(sums, kind="stable")[: len(dealt)]
        row[lightest] = dealt
        sums[lightest] += lengths[dealt]
    return [column[column >= 0] for column in np.ascontiguousarray(table.T)]


def rounded_up(size: int, bucket: int) -> int:
    """The smallest positive multiple of `bucket` that is at least `size`."""
    return max(1, -(-size // bucket)) * bucket


def pack(
    expanded: Expanded,
    first: int,
    last: int,
    *,
    states: int,
    bucket: int,
    sample_ids: np.ndarray,
    epochs: np.ndarray,
    step: int,
    index: int,
) -> PackedBatch:
    """Cut sequences first..last-1 out of `expanded` into a micro-batch of their own, sizes padded up to `bucket`.

    `sample_ids` and `epochs` int64[last - first]. Arrays that need no padding are views, not copies.
    """
    t0, t1 = int(expanded.cu_tokens[first]), int(expanded.cu_tokens[last])
    n0, n1 = int(expanded.cu_targets[first]), int(expanded.cu_targets[last])
    tokens, targets = rounded_up(t1 - t0, bucket), rounded_up(n1 - n0, bucket)
    num_states = states * (n1 - n0)
    cu_tokens = expanded.cu_tokens[first : last + 1] - t0
    cu_targets = expanded.cu_targets[first : last + 1] - n0
    return PackedBatch(
        input_ids=_padded(expanded.input_ids[t0:t1], tokens, PAD),
        position=_padded(expanded.position[t0:t1], tokens, 0),
        clone=_padded(expanded.clone[t0:t1], tokens, 0),
        cu_tokens=cu_tokens,
        state_index=_padded(expanded.state_index[states * n0 : states * n1] - t0, rounded_up(num_states, bucket), 0),
        cu_states=states * cu_targets,
        target_ids=_padded(expanded.target_ids[n0:n1], targets, PAD),
        cu_targets=cu_targets,
        is_masked=_padded(expanded.is_masked[n0:n1], targets, False),
        sample_ids=sample_ids,
        epochs=epochs,
        states=states,
        step=step,
        index=index,
        num_original_tokens=t1 - t0 - num_states + n1 - n0,
    )


def _padded(values: np.ndarray, size: int, filler: int | bool) -> np.ndarray:
    """`values` followed by `filler` up to `size`; the array itself if it has that size already."""
    if len(values) == size:
        return values
    result = np.full(size, filler, values.dtype)
    result[: len(values)] = values
    return result
