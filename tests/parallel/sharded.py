"""Reads the local part of a model through DeepSpeed's own accessors, and assembles the full one from all ranks'."""

from __future__ import annotations

from typing import Any

import numpy as np


def pieces(engine: Any, key: str | None) -> dict[str, Any]:
    """{name: (full shape, dim, start, stop, values)} of the local weights, or of the moment `key`."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for sharded in engine.parameters:
        if engine.zero == 0:
            value = sharded.parameter if key is None else engine.inner_optimizer.state[sharded.parameter][key]
        elif key is None:
            value = safe_get_full_fp32_param(sharded.parameter)
        else:
            value = safe_get_full_optimizer_state(sharded.parameter, key)
        extent = (
            (0, 0, sharded.shape[0])
            if sharded.slice is None
            else (sharded.slice.dim, sharded.slice.start, sharded.slice.stop)
        )
        # float32 numpy can be sent from the ranks to the test.
        found[sharded.name] = (
            sharded.shape,
            *extent,
            value.detach().float().numpy().reshape(_local_shape(sharded)).copy(),
        )
    return found


def _local_shape(sharded):
    """Shape of the local tensor (ZeRO 3 has emptied it), padding of a vocabulary included."""
    shape = list(sharded.part_shape)
    if sharded.slice is not None:
        shape[sharded.slice.dim] = -1
    return shape


def assembled(ranks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """{name: full array} from the `pieces` of all ranks; replicas of a piece must be equal to the bit."""
    full, filled = {}, {}
    for found in ranks:
        for name, (shape, dim, start, stop, values) in found.items():
            target = full.setdefault(name, np.zeros(shape, np.float32))
            seen = filled.setdefault(name, np.zeros(shape, bool))
            index = (slice(None),) * dim + (slice(start, stop),)
            part = values[(slice(None),) * dim + (slice(0, stop - start),)]
            if seen[index].all():
                assert np.array_equal(target[index], part), f"{name}: replicas differ"
            target[index], seen[index] = part, True
    assert all(seen.all() for seen in filled.values())
    return full
