"""What a rank holds of a model, read through DeepSpeed's own accessors, and the whole from what all ranks hold."""

from __future__ import annotations

from typing import Any

import numpy as np


def pieces(engine: Any, key: str | None) -> dict[str, Any]:
    """{name: (full shape, dim, start, stop, values)} of what this rank holds: the weights, or the moment `key`."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for held in engine.parameters:
        if engine.zero == 0:
            value = held.parameter if key is None else engine.inner_optimizer.state[held.parameter][key]
        elif key is None:
            value = safe_get_full_fp32_param(held.parameter)
        else:
            value = safe_get_full_optimizer_state(held.parameter, key)
        place = (0, 0, held.shape[0]) if held.slice is None else (held.slice.dim, held.slice.start, held.slice.stop)
        # float32 numpy: what travels from the ranks to the test.
        found[held.name] = (held.shape, *place, value.detach().float().numpy().reshape(_local_shape(held)).copy())
    return found


def _local_shape(held):
    """Shape of the local tensor (ZeRO 3 has emptied it), padding of a vocabulary included."""
    shape = list(held.part_shape)
    if held.slice is not None:
        shape[held.slice.dim] = -1
    return shape


def assembled(ranks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """{name: full array} from the `pieces` of all ranks; copies of a piece must be equal to the last bit."""
    full, filled = {}, {}
    for found in ranks:
        for name, (shape, dim, start, stop, values) in found.items():
            target = full.setdefault(name, np.zeros(shape, np.float32))
            seen = filled.setdefault(name, np.zeros(shape, bool))
            index = (slice(None),) * dim + (slice(start, stop),)
            part = values[(slice(None),) * dim + (slice(0, stop - start),)]
            if seen[index].all():
                assert np.array_equal(target[index], part), f"{name}: copies differ"
            target[index], seen[index] = part, True
    assert all(seen.all() for seen in filled.values())
    return full
