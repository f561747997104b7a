"""Where DeepSpeed keeps the fp32 numbers that a rank updates: one class per kind of ZeRO, all with the same methods.

A fragment is the range of a flattened local tensor (padding included) for which this rank holds master copy and
moments.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import nn

from exlm_dist.parallel.sharded import ShardedParameter
from exlm_dist.training.engine.base import Engine


class Fragments(Protocol):
    """Access to the fragments of a rank. `moment`: None for the parameter, else a state of the optimizer."""

    #: Whether every data-parallel rank holds all of them.
    replicated: bool

    def extent(self, held: ShardedParameter) -> tuple[int, int]:
        """First number and the one after the last; equal where this rank has none."""

    def local_numel(self, held: ShardedParameter) -> int:
        """Numbers of the local tensor, padding included."""

    def read(self, held: ShardedParameter, moment: str | None) -> torch.Tensor:
        """The numbers, flat; valid until the next step."""

    def write(self, held: ShardedParameter, moment: str | None, values: torch.Tensor) -> None:
        """Replace all numbers of the fragment (and of the part of the working copy that goes with it)."""

    def copies_whole(self, held: ShardedParameter) -> bool:
        """Whether this rank works with a copy of the whole local tensor, which `refresh` must fill after a `write`:
        the next step would run on stale weights."""

    def refresh(self, held: ShardedParameter, values: torch.Tensor) -> None:
        """Replace the working copy."""


def fragments_of(engine: Engine) -> Fragments:
    """Access for the ZeRO stage of the engine."""
    return {0: _Replicated, 1: _Mapped, 2: _Mapped, 3: _Partitioned}[engine.zero](engine)


class _Replicated:
    """ZeRO 0. DeepSpeed's accessors do not work here; its 16-bit wrapper has the fp32 copies in `fp32_groups`."""

    replicated = True

    def __init__(self, engine: Engine) -> None:
        self._state = engine.inner_optimizer.state
        self._copies: dict[nn.Parameter, torch.Tensor] = {}
        if engine.dtype != torch.float32:
            wrapper = engine.deepspeed.optimizer
            for halves, fulls in zip(wrapper.fp16_groups, wrapper.fp32_groups):
                self._copies.update(zip(halves, fulls))

    def extent(self, held: ShardedParameter) -> tuple[int, int]:
        return 0, held.parameter.numel()

    def local_numel(self, held: ShardedParameter) -> int:
        return held.parameter.numel()

    def read(self, held: ShardedParameter, moment: str | None) -> torch.Tensor:
        master = self._copies.get(held.parameter, held.parameter)
        return (master if moment is None else self._state[master][moment]).detach().view(-1)

    def write(self, held: ShardedParameter, moment: str | None, values: torch.Tensor) -> None:
        self.read(held, moment).copy_(values)

    def copies_whole(self, held: ShardedParameter) -> bool:
        return held.parameter in self._copies

    def refresh(self, held: ShardedParameter, values: torch.Tensor) -> None:
        held.parameter.data.view(-1).copy_(values)


class _Mapped:
    """ZeRO 1 and 2: `_hp_mapping` links a parameter to its fragment of the flat partition."""

    replicated = False

    def __init__(self, engine: Engine) -> None:
        pass

    def extent(self, held: ShardedParameter) -> tuple[int, int]:
        mapping = held.parameter._hp_mapping
        if mapping is None:
            return 0, 0
        address = mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def local_numel(self, held: ShardedParameter) -> int:
        return held.parameter.numel()

    def read(self, held: ShardedParameter, moment: str | None) -> torch.Tensor:
        return held.parameter._hp_mapping.get_hp_fragment(moment).detach()

    def write(self, held: ShardedParameter, moment: str | None, values: torch.Tensor) -> None:
        self.read(held, moment).copy_(values)

    def copies_whole(self, held: ShardedParameter) -> bool:
        return True

    def refresh(self, held: ShardedParameter, values: torch.Tensor) -> None:
        held.parameter.data.view(-1).copy_(values)


class _Partitioned:
    """ZeRO 3: equal parts of each parameter, the end of the last filled up."""

    replicated = False

    def __init__(self, engine: Engine) -> None:
        pass

    def extent(self, held: ShardedParameter) -> tuple[int, int]:
        size = held.parameter.ds_tensor.numel()
        start = size * torch.distributed.get_rank(held.parameter.ds_process_group)
        return start, start + size

    def local_numel(self, held: ShardedParameter) -> int:
        return math.prod(held.parameter.ds_shape)

    def read(self, held: ShardedParameter, moment: str | None) -> torch.Tensor:
        # What the public accessors ask. They bring numbers that are kept on the host to the GPU first.
        optimizer = held.parameter._z3_optimizer
        numbers, _ = optimizer._get_fp32_opt_state_partition(held.parameter, True, optim_state_key=moment)
        return numbers.detach().view(-1)

    def write(self, held: ShardedParameter, moment: str | None, values: torch.Tensor) -> None:
        from deepspeed import utils

        if moment is not None:
            utils.safe_set_local_optimizer_state(held.parameter, values, moment)
            return
        utils.safe_set_local_fp32_param(held.parameter, values)
        held.parameter.ds_tensor.data.view(-1).copy_(values)

    def copies_whole(self, held: ShardedParameter) -> bool:
        """Small parameters are kept gathered, and would go on with their old values."""
        return held.parameter.data.numel() == self.local_numel(held)

    def refresh(self, held: ShardedParameter, values: torch.Tensor) -> None:
        held.parameter.data.view(-1).copy_(values)
