"""State out of the engine and back into it, free of layout: fp32 parameters and moments by canonical name, in pieces.

Each rank reads and writes the elements that it owns of its local parameters; after reading, the copies that ranks
compute with are gathered from them, as after a step. The pieces are assembled again for whatever ZeRO stage, world
size, slicing and precision the run continues with.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from exlm_dist.checkpoint.pieces import Piece, Slice
from exlm_dist.checkpoint.tensors import Index, TensorReader
from exlm_dist.launch import heartbeat
from exlm_dist.parallel.sharded import ShardedParameter
from exlm_dist.training.engine.base import Engine
from exlm_dist.training.engine.fragments import fragments_of
from exlm_dist.utils.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
#: State of the dynamic loss scale (fp16), as DeepSpeed names it.
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Tensors(Protocol):
    """What an engine is filled from; `exlm_dist.checkpoint.tensors.TensorReader` is one."""

    def read(self, name: str, moment: str | None, part: Slice | None, start: int, stop: int) -> np.ndarray:
        """Elements `start` to `stop` of the flattened slice `part` (None: all) of a parameter or moment, fp32."""


@dataclass(frozen=True)
class OwnedRange:
    """Elements `start` to `stop` of the flattened local part of a parameter: those that this rank saves."""

    sharded: ShardedParameter
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Elements in it."""
        return self.stop - self.start


def owned_ranges(engine: Engine) -> list[OwnedRange]:
    """What this rank saves. Over all ranks, every element is saved exactly once."""
    fragments = fragments_of(engine)
    owned = [
        OwnedRange(sharded, *_unpadded(sharded, *fragments.bounds(sharded)))
        for sharded in engine.parameters
        if sharded.saved
    ]
    if fragments.replicated:
        owned = _split_evenly(owned, *engine.replica)
    return [part for part in owned if part.numel > 0]


def _unpadded(sharded: ShardedParameter, start: int, stop: int) -> tuple[int, int]:
    """A range of the flattened local tensor without the padding at its end."""
    size = math.prod(sharded.part_shape)
    return min(start, size), min(stop, size)


def _split_evenly(parts: list[OwnedRange], replica: int, replicas: int) -> list[OwnedRange]:
    """One of equal splits of all `parts`, for one of several replicas: contiguous in the order of the parts."""
    total = sum(part.numel for part in parts)
    low, high = total * replica // replicas, total * (replica + 1) // replicas
    split, at = [], 0
    for part in parts:
        start, stop = max(low, at), min(high, at + part.numel)
        split.append(OwnedRange(part.sharded, part.start + start - at, part.start + max(start, stop) - at))
        at += part.numel
    return split


def gather_index(engine: Engine, parts: list[OwnedRange]) -> Index:
    """The index of what all ranks save, on every rank. A collective. CheckpointError where it does not make up the
    model."""
    rank = engine.process.rank
    pieces = {part.sharded.name: [Piece(part.sharded.slice, part.start, part.stop, rank)] for part in parts}
    shapes = {sharded.name: sharded.shape for sharded in engine.parameters}
    mine = Index(shapes, {name: pieces.get(name, []) for name in shapes}, MOMENTS)
    index = Index.merged(engine.process.all_gather_object(mine.as_json()))
    index.check()
    return index


def owned_tensors(engine: Engine, parts: list[OwnedRange]) -> list[torch.Tensor]:
    """The elements of `parts` where they are, flat fp32: parameters, then each moment in turn. The next optimizer step
    changes them, and nothing else does.

    Only after the first optimizer step: before it there are no moments.
    """
    fragments = fragments_of(engine)
    firsts = [fragments.bounds(part.sharded)[0] for part in parts]
    return [
        fragments.read(part.sharded, moment)[part.start - first : part.stop - first]
        for moment in (None, *MOMENTS)
        for part, first in zip(parts, firsts)
    ]


def copy_out(tensors: list[torch.Tensor], into: torch.Tensor, stream: torch.cuda.Stream | None = None) -> None:
    """Copy flat `tensors` to the flat CPU tensor `into`, one after the other. From a GPU by `stream`, concurrently with
    its other work if the memory of `into` is pinned; complete on return. May be called in a thread of its own."""
    at = 0
    if stream is not None:
        # A thread starts on GPU 0, and would open a context of half a gigabyte there when it leaves `stream`.
        torch.cuda.set_device(stream.device)
    with torch.no_grad(), contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        for values in tensors:
            into[at : at + len(values)].copy_(values, non_blocking=stream is not None)
            at += len(values)
    if stream is not None:
        stream.synchronize()


def scalars(engine: Engine) -> dict[str, Any]:
    """Counters of optimizer and loss scale."""
    result: dict[str, Any] = {"optimizer_step": int(next(iter(engine.inner_optimizer.state.values()))["step"])}
    if engine.dtype == torch.float16:
        scaler = engine.deepspeed.optimizer.loss_scaler
        result["loss_scale"] = {name: getattr(scaler, name) for name in LOSS_SCALE if hasattr(scaler, name)}
    return result


def check_index(present: Index, saved: Index) -> None:
    """CheckpointError when parameters, shapes or moments of a checkpoint (`saved`) are not those of the model."""
    expected, found = present.shapes, saved.shapes
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        lines = [
            f"  {name}: {found.get(name, 'absent')} in the checkpoint, {expected.get(name, 'absent')} in the model"
            for name in wrong[:5]
        ]
        raise CheckpointError(f"{len(wrong)} parameters of the checkpoint do not fit the model:\n" + "\n".join(lines))
    if present.moments != saved.moments:
        raise CheckpointError(f"the checkpoint has the optimizer states {saved.moments}, not {present.moments}.")


def restore(engine: Engine, tensors: TensorReader, state: dict[str, Any]) -> None:
    """Fill the engine from a checkpoint; each rank reads what it owns. The moments must exist: `Engine.prime`. A
    collective."""
    _fill(engine, engine.parameters, tensors, (None, *MOMENTS))
    for entry in engine.inner_optimizer.state.values():
        entry["step"].fill_(state["optimizer_step"])
    if "loss_scale" in state and engine.dtype == torch.float16:
        for name, value in state["loss_scale"].items():
            setattr(engine.deepspeed.optimizer.loss_scaler, name, value)


def fill_parameters(engine: Engine, tensors: Tensors, names: Container[str]) -> None:
    """Replace the parameters `names` of an engine that has not trained yet; there are no moments so far. A
    collective."""
    _fill(engine, [sharded for sharded in engine.parameters if sharded.name in names], tensors, (None,))


@torch.no_grad()
def _fill(
    engine: Engine, parameters: Sequence[ShardedParameter], tensors: Tensors, moments: Sequence[str | None]
) -> None:
    """This rank's fragments of parameters (None among `moments`) and moments, then the copies that all compute with."""
    fragments = fragments_of(engine)
    read = functools.partial(_padded, tensors)
    for sharded in heartbeat.keep_alive(parameters):
        start, stop = fragments.bounds(sharded)
        for moment in moments:
            if stop > start:
                fragments.write(sharded, moment, read(sharded, moment, start, stop))
    fragments.refresh(parameters, read)


def _padded(tensors: Tensors, sharded: ShardedParameter, moment: str | None, start: int, stop: int) -> torch.Tensor:
    """Elements `start` to `stop` of the flattened local tensor, fp32; 0 where that is padding."""
    values = torch.zeros(stop - start)
    low, high = _unpadded(sharded, start, stop)
    values[: high - low] = torch.from_numpy(tensors.read(sharded.name, moment, sharded.slice, low, high))
    return values
