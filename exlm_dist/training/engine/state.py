"""State out of the engine and back into it, free of layout: fp32 parameters and moments by canonical name, in pieces.

Each rank reads and writes the numbers that it owns of the parameters that it holds: no tensor travels between ranks.
The pieces are put together again at whatever ZeRO stage, world size, slicing and precision the run goes on with. Traps
met here are listed in docs/checkpoints.md.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exlm_dist.checkpoint import reader
from exlm_dist.checkpoint.pieces import Piece
from exlm_dist.checkpoint.tensors import Index, TensorReader
from exlm_dist.parallel.process import Process
from exlm_dist.parallel.sharded import ShardedParameter
from exlm_dist.training.engine.base import Engine
from exlm_dist.training.engine.fragments import Fragments, fragments_of
from exlm_dist.utils.errors import CheckpointError
from exlm_dist.utils.logs import get_logger

MOMENTS = ("exp_avg", "exp_avg_sq")
#: State of the dynamic loss scale (fp16), as DeepSpeed names it.
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
logger = get_logger(__name__)


@dataclass(frozen=True)
class Owned:
    """Numbers `start` to `stop` of the flattened part of a parameter that this rank holds: those it saves."""

    held: ShardedParameter
    start: int
    stop: int


def owned(engine: Engine) -> list[Owned]:
    """What this rank saves; together, the ranks save every number once."""
    fragments = fragments_of(engine)
    saved = [Owned(held, *_unpadded(held, fragments)) for held in engine.parameters if held.saved]
    if fragments.replicated:
        saved = _share(saved, *engine.replica)
    return [part for part in saved if part.stop > part.start]


def _unpadded(held: ShardedParameter, fragments: Fragments) -> tuple[int, int]:
    """Range of the fragment without the padding at the end of the local tensor."""
    start, stop = fragments.extent(held)
    size = math.prod(held.part_shape)
    return min(start, size), min(stop, size)


def _share(parts: list[Owned], replica: int, replicas: int) -> list[Owned]:
    """The equal share of one of several replicas: a consecutive stretch of all parts."""
    total = sum(part.stop - part.start for part in parts)
    low, high = total * replica // replicas, total * (replica + 1) // replicas
    shares, at = [], 0
    for part in parts:
        end = at + part.stop - part.start
        start, stop = max(low, at), min(high, end)
        shares.append(Owned(part.held, part.start + start - at, part.start + max(start, stop) - at))
        at = end
    return shares


def layout(engine: Engine, parts: list[Owned]) -> Index:
    """The index of what all ranks save, on every rank. A collective. CheckpointError where it does not make up the
    model."""
    pieces = {part.held.name: [Piece(part.held.slice, part.start, part.stop, engine.process.rank)] for part in parts}
    mine = Index({held.name: held.shape for held in engine.parameters}, {}, MOMENTS)
    mine.pieces.update({name: pieces.get(name, []) for name in mine.shapes})
    index = Index.merged(engine.process.all_gather_object(mine.as_json()))
    index.check()
    return index


def sources(engine: Engine, parts: list[Owned]) -> list[torch.Tensor]:
    """Where the numbers of `parts` lie, flat fp32: parameters, then each moment in turn. They change with the next
    optimizer step, and with nothing else.

    Only after the first optimizer step: before it there are no moments.
    """
    fragments = fragments_of(engine)
    firsts = [fragments.extent(part.held)[0] for part in parts]
    return [
        fragments.read(part.held, moment)[part.start - first : part.stop - first]
        for moment in (None, *MOMENTS)
        for part, first in zip(parts, firsts)
    ]


def copy_out(numbers: list[torch.Tensor], into: torch.Tensor, stream: torch.cuda.Stream | None = None) -> None:
    """Copy `numbers` to the flat CPU tensor `into`, one after the other. From a GPU by `stream`, beside whatever else
    runs there if the memory of `into` is pinned; all is there on return."""
    at = 0
    with torch.no_grad(), contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        for values in numbers:
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


def check(present: Index, saved: Index) -> None:
    """CheckpointError when parameters, shapes or moments of a checkpoint are not those of the model."""
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


def put(engine: Engine, tensors: TensorReader, state: dict[str, Any]) -> None:
    """Fill the engine from a checkpoint; each rank reads what it needs. The moments must exist: `Engine.prime`."""
    fragments = fragments_of(engine)
    with torch.no_grad():
        for held in engine.parameters:
            start, stop = fragments.extent(held)
            for moment in (None, *MOMENTS):
                if stop > start:
                    fragments.write(held, moment, _padded(tensors, held, moment, start, stop))
            if fragments.copies_whole(held):
                fragments.refresh(held, _padded(tensors, held, None, 0, fragments.local_numel(held)))
    for entry in engine.inner_optimizer.state.values():
        entry["step"].fill_(state["optimizer_step"])
    if "loss_scale" in state and engine.dtype == torch.float16:
        for name, value in state["loss_scale"].items():
            setattr(engine.deepspeed.optimizer.loss_scaler, name, value)


def _padded(tensors: TensorReader, held: ShardedParameter, moment: str | None, start: int, stop: int) -> torch.Tensor:
    """Numbers `start` to `stop` of the flattened local tensor; 0 where that is padding."""
    size = math.prod(held.part_shape)
    values = torch.zeros(stop - start)
    low, high = min(start, size), min(stop, size)
    values[: high - low] = torch.from_numpy(tensors.read(held.name, moment, held.slice, low, high))
    return values


def select(run_folder: Path, process: Process) -> tuple[Path, dict[str, Any]] | None:
    """(folder, state) of the newest checkpoint that is whole on every rank; None when the run has none. A collective.

    Every rejected one is reported with the reason. CheckpointError, on every rank, when there are some but none is
    whole.
    """
    candidates = process.broadcast_object([folder.name for folder in reader.checkpoint_folders(run_folder)])
    rejected = []
    for name in candidates:
        folder = Path(run_folder) / reader.CHECKPOINTS / name
        reasons = process.all_gather_object(_rejection(folder, process))
        reason = next((reason for reason in reasons if reason), None)
        if reason is None:
            return folder, process.run_on_first_rank(lambda folder=folder: reader.read_state(folder))
        rejected.append(f"{name}: {reason}")
        if process.is_first:
            logger.warning("checkpoint rejected: %s", reason)
    if rejected:
        raise CheckpointError(
            f"none of the {len(rejected)} checkpoints in {run_folder} is whole:\n  "
            + "\n  ".join(rejected)
            + "\nPut a whole one back, or remove the run folder to start anew."
        )
    return None


def _rejection(folder: Path, process: Process) -> str | None:
    """Why this rank cannot use the checkpoint. The ranks share the reading of the files; each looks at all sizes."""
    try:
        reader.verify(folder, split=(process.rank, process.world))
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError, KeyError) as error:
        return f"{folder} cannot be read: {error}"
    return None
