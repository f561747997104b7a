"""Initial values: a pure function of the seed and a parameter's canonical name, the same in every layout."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from exlm_dist.parallel.sharded import ShardedParameter
from exlm_dist.utils.seeding import seed_from


def initial_value(name: str, shape: tuple[int, ...], *, seed: int | None, std: float) -> torch.Tensor:
    """Initial value of the parameter `name`: N(0, std) for matrices, 0 for biases, 1 for gains of norms. CPU, fp32.

    `seed` None: nothing is drawn, and matrices are 0, for a model that is to be filled from a checkpoint.
    """
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    if seed is None:
        return torch.zeros(()).expand(shape)
    generator = torch.Generator().manual_seed(seed_from(seed, "init", name))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(parameters: Iterable[ShardedParameter], *, seed: int | None, std: float) -> None:
    """Give each parameter its initial value: the local part of the full tensor, and 0 in the padding. One full tensor
    exists at a time."""
    for sharded in parameters:
        value = initial_value(sharded.name, sharded.shape, seed=seed, std=std)
        part = sharded.slice
        if part is None:
            sharded.parameter.copy_(value)
        else:
            length = part.stop - part.start
            sharded.parameter.zero_().narrow(part.dim, 0, length).copy_(value.narrow(part.dim, part.start, length))


def allocate(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Replace the parameters of `model` that are on the meta device by uninitialised ones. One that several modules
    have in common stays one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if old.is_meta:
                if old not in made:
                    made[old] = nn.Parameter(torch.empty(old.shape, dtype=dtype, device=device))
                setattr(module, name, made[old])
