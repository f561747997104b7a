"""Initial values: a pure function of the seed and a parameter's canonical name, so that every layout starts alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from exlm_dist.utils.seeding import seed_from


def initial_value(name: str, shape: torch.Size, *, seed: int, std: float) -> torch.Tensor:
    """First value of the parameter `name`: N(0, std) for matrices, 0 for biases, 1 for gains of norms. CPU, fp32."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(seed_from(seed, "init", name))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(parameters: Iterable[tuple[str, nn.Parameter]], *, seed: int, std: float) -> None:
    """Give each of (canonical name, parameter) its initial value."""
    for name, parameter in parameters:
        parameter.copy_(initial_value(name, parameter.shape, seed=seed, std=std))
