"""Global batch -> micro-batches -> packed arrays. The plan depends on the lengths alone, so every rank has the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

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
    sums = [0] * count
    plan: list[list[int]] = [[] for _ in range(count)]
    sequences = zip(order.tolist(), lengths[order].tolist())
    for _ in range(0, len(order), count):
        lightest = sorted(range(count), key=sums.__getitem__)
        for batch, (sequence, length) in zip(lightest, sequences):
            plan[batch].append(sequence)
            sums[batch] += length
    return [np.array(batch, np.int64) for batch in plan]


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

    `sample_ids` and `epochs` int64[last - first].
    """
    (batch,) = pack_each(
        expanded,
        np.array([first, last]),
        states=states,
        bucket=bucket,
        sample_ids=[sample_ids],
        epochs=[epochs],
        step=step,
        indices=[index],
    )
    return batch


def pack_each(
    expanded: Expanded,
    edges: np.ndarray,
    *,
    states: int,
    bucket: int,
    sample_ids: Sequence[np.ndarray],
    epochs: Sequence[np.ndarray],
    step: int,
    indices: Sequence[int],
) -> list[PackedBatch]:
    """Micro-batches i of the sequences edges[i]..edges[i+1]-1 of `expanded`, as `pack` makes each. Their arrays are
    views of common ones, which are made at once."""
    tokens = _Pieces(expanded.cu_tokens[edges], bucket)
    targets = _Pieces(expanded.cu_targets[edges], bucket)
    of_states = _Pieces(states * expanded.cu_targets[edges], bucket)
    columns = {
        "input_ids": tokens.padded(expanded.input_ids, PAD),
        "position": tokens.padded(expanded.position, 0),
        "clone": tokens.padded(expanded.clone, 0),
        "state_index": of_states.padded(expanded.state_index, 0, minus=tokens.starts),
        "target_ids": targets.padded(expanded.target_ids, PAD),
        "is_masked": targets.padded(expanded.is_masked, False),
    }
    return [
        _packed(
            expanded,
            first,
            last,
            {name: pieces[place] for name, pieces in columns.items()},
            states=states,
            sample_ids=sample_ids[place],
            epochs=epochs[place],
            step=step,
            index=indices[place],
        )
        for place, (first, last) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist()))
    ]


def _packed(expanded: Expanded, first: int, last: int, columns: dict, *, states: int, **named: Any) -> PackedBatch:
    """The micro-batch of sequences first..last-1, whose padded arrays are given."""
    cu_tokens = expanded.cu_tokens[first : last + 1] - expanded.cu_tokens[first]
    cu_targets = expanded.cu_targets[first : last + 1] - expanded.cu_targets[first]
    return PackedBatch(
        **columns,
        cu_tokens=cu_tokens,
        cu_states=states * cu_targets,
        cu_targets=cu_targets,
        states=states,
        num_original_tokens=int(cu_tokens[-1]) - (states - 1) * int(cu_targets[-1]),
        **named,
    )


class _Pieces:
    """Where micro-batches are in a flat array, from starts[i] to starts[i+1], and in one that is padded to `bucket`."""

    def __init__(self, starts: np.ndarray, bucket: int) -> None:
        self.starts = starts.tolist()
        sizes = [end - start for start, end in zip(self.starts, self.starts[1:])]
        self._padded = [0, *accumulate(rounded_up(size, bucket) for size in sizes)]

    def padded(self, values: np.ndarray, filler: int, minus: Sequence[int] = ()) -> list[np.ndarray]:
        """Each piece of `values` (less minus[i], if given), followed by `filler`."""
        whole = np.empty(self._padded[-1], values.dtype)
        pieces = []
        for place, (start, end) in enumerate(zip(self.starts, self.starts[1:])):
            piece = whole[self._padded[place] : self._padded[place + 1]]
            if minus:
                np.subtract(values[start:end], minus[place], out=piece[: end - start])
            else:
                piece[: end - start] = values[start:end]
            piece[end - start :] = filler
            pieces.append(piece)
        return pieces
