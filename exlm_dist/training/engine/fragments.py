"""Where DeepSpeed keeps the fp32 elements that a rank updates: one class per kind of ZeRO, all with the same methods.

A fragment is the range of a flattened local tensor (padding included) for which this rank has master copy and moments.
The traps that the classes avoid are listed in docs/checkpoints.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch

from exlm_dist.parallel.sharded import ShardedParameter
from exlm_dist.training.engine.base import Engine

#: (parameter, moment, start, stop) -> these elements of the flattened local tensor, fp32, 0 where it is padding.
Read = Callable[[ShardedParameter, str | None, int, int], torch.Tensor]


class Fragments(ABC):
    """Access to the fragments of a rank. `moment`: None for the parameter, else a state of the optimizer."""

    #: Whether every data-parallel rank has all of them.
    replicated = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @abstractmethod
    def bounds(self, sharded: ShardedParameter) -> tuple[int, int]:
        """First element and the one after the last; equal where this rank has none."""

    @abstractmethod
    def read(self, sharded: ShardedParameter, moment: str | None) -> torch.Tensor:
        """The elements, flat; valid until the next step."""

    def write(self, sharded: ShardedParameter, moment: str | None, values: torch.Tensor) -> None:
        """Replace all elements of the fragment."""
        self.read(sharded, moment).copy_(values)

    @abstractmethod
    def refresh(self, parameters: Iterable[ShardedParameter], read: Read) -> None:
        """After all `write`s to `parameters`: renew the copies that ranks compute with, or the next step uses stale
        weights. `read`: where the fragments came from, for elements that no rank has as its own. A collective."""


def fragments_of(engine: Engine) -> Fragments:
    """Access for the ZeRO stage of the engine."""
    kinds: dict[int, type[Fragments]] = {0: _Replicated, 1: _Mapped, 2: _Mapped, 3: _Partitioned}
    return kinds[engine.zero](engine)


def _annotated(sharded: ShardedParameter) -> Any:
    """The parameter, with the attributes that DeepSpeed has put on it."""
    return sharded.parameter


class _Replicated(Fragments):
    """ZeRO 0. DeepSpeed's accessors do not work here; its 16-bit wrapper has the fp32 copies in `fp32_groups`."""

    replicated = True

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._state = engine.inner_optimizer.state
        self._masters: dict[torch.Tensor, torch.Tensor] = {}
        if engine.dtype != torch.float32:
            wrapper = engine.deepspeed.optimizer
            for halves, fulls in zip(wrapper.fp16_groups, wrapper.fp32_groups):
                self._masters.update(zip(halves, fulls))

    def bounds(self, sharded: ShardedParameter) -> tuple[int, int]:
        return 0, sharded.parameter.numel()

    def read(self, sharded: ShardedParameter, moment: str | None) -> torch.Tensor:
        master = self._masters.get(sharded.parameter, sharded.parameter)
        return (master if moment is None else self._state[master][moment]).detach().view(-1)

    def refresh(self, parameters: Iterable[ShardedParameter], read: Read) -> None:
        for working, master in self._masters.items():
            working.data.copy_(master.data)


class _Mapped(Fragments):
    """ZeRO 1 and 2: `_hp_mapping` links a parameter to its fragment of the flat partition."""

    def bounds(self, sharded: ShardedParameter) -> tuple[int, int]:
        mapping = _annotated(sharded)._hp_mapping
        if mapping is None:
            return 0, 0
        address = mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def read(self, sharded: ShardedParameter, moment: str | None) -> torch.Tensor:
        return _annotated(sharded)._hp_mapping.get_hp_fragment(moment).detach()

    def refresh(self, parameters: Iterable[ShardedParameter], read: Read) -> None:
        """Each rank sends its fragments to the others, as after a step: a file system is slower."""
        self._engine.deepspeed.optimizer.update_lp_params()


class _Partitioned(Fragments):
    """ZeRO 3: equal parts of each parameter, the last one padded at its end."""

    def bounds(self, sharded: ShardedParameter) -> tuple[int, int]:
        parameter = _annotated(sharded)
        size = parameter.ds_tensor.numel()
        start = size * torch.distributed.get_rank(parameter.ds_process_group)
        return start, start + size

    def read(self, sharded: ShardedParameter, moment: str | None) -> torch.Tensor:
        # What the public accessors ask. They bring elements that are kept on the host to the GPU first.
        optimizer = _annotated(sharded)._z3_optimizer
        elements, _ = optimizer._get_fp32_opt_state_partition(sharded.parameter, True, optim_state_key=moment)
        return elements.detach().view(-1)

    def write(self, sharded: ShardedParameter, moment: str | None, values: torch.Tensor) -> None:
        from deepspeed import utils

        if moment is not None:
            utils.safe_set_local_optimizer_state(sharded.parameter, values, moment)
            return
        utils.safe_set_local_fp32_param(sharded.parameter, values)
        _annotated(sharded).ds_tensor.data.view(-1).copy_(values)

    def refresh(self, parameters: Iterable[ShardedParameter], read: Read) -> None:
        """Small parameters are kept gathered, and would keep their old values."""
        for sharded in parameters:
            size = math.prod(_annotated(sharded).ds_shape)
            if sharded.parameter.data.numel() == size:
                sharded.parameter.data.view(-1).copy_(read(sharded, None, 0, size))
