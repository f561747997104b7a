"""Whether any rank says yes, told to all in few rounds: what every step edge waits for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def rounds(world: int) -> list[int]:
    """Distances 1, 2, 4, ... below `world`: in each round a rank tells the one so far after it all that it has heard.
    After the round of distance d it has heard of the 2 d ranks up to itself, so at the end of all."""
    return [1 << bit for bit in range((world - 1).bit_length())]


def any_of(flag: bool, rank: int, world: int, group: Any) -> bool:
    """Whether `flag` is set on at least one rank of `group` (gloo, all ranks of the job). A collective.

    log2(world) messages one after the other (dissemination; Hensgen, Finkel and Manber 1988). gloo's own collectives
    pass a value around a ring: world - 1 messages one after the other, with the GPU idle meanwhile.
    """
    mine, theirs = torch.tensor([flag], dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    for distance in rounds(world):
        sent = dist.isend(mine.clone(), (rank + distance) % world, group=group)
        dist.recv(theirs, (rank - distance) % world, group=group)
        assert sent is not None  # this rank is in the group
        sent.wait()
        mine |= theirs
    return bool(mine)
