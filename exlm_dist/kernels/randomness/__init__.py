"""Where the random numbers of a dropout come from: a seed, and the number of the site that draws.

The seed is an int, or an int64 tensor of one element on the device of the operands. A Triton kernel reads it from
memory, so the host does not wait, and a captured CUDA graph draws from the value that the tensor has at its replay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exlm_dist.utils.seeding import seed_from


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed as an int64 tensor of one element on `device`; ValueError for any other tensor."""
    if not isinstance(seed, Tensor):
        seed &= 2**64 - 1
        return torch.full((1,), seed - (seed >> 63 << 64), dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(
            f"the seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}, "
            f"expected an int or one int64 on {device}, where the operands are"
        )
    return seed


def site_seed(seed: int | Tensor, site: int) -> int:
    """One number from both, for a generator of torch's (synchronises with the device if the seed is there)."""
    return seed_from("dropout", int(seed), site)
