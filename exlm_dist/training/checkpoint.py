"""State out of the engine and back into it, free of layout: fp32 parameters and moments by canonical name.

The same at every ZeRO stage, world size and precision, so any may change at a resume. Traps met here are listed in
docs/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exlm_dist.model import checkpoint_reader as reader
from exlm_dist.parallel.grid import Line
from exlm_dist.parallel.process import Process
from exlm_dist.training.engine import Engine
from exlm_dist.utils.errors import CheckpointError
from exlm_dist.utils.logs import get_logger

MOMENTS = ("exp_avg", "exp_avg_sq")
#: State of the dynamic loss scale (fp16), as DeepSpeed names it.
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

Tensors = dict[str, torch.Tensor]
logger = get_logger(__name__)


def take(engine: Engine) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """(parameters, moments, scalars) of the engine; the tensors are filled on rank 0 only. A collective.

    Only after the first optimizer step: before it there are no moments.
    """
    read = _reader(engine)
    keep = engine.process.is_first
    model: Tensors = {}
    optimizer: Tensors = {}
    for held in engine.parameters:
        for key in (None, *MOMENTS):
            value = read(held.parameter, key).detach().reshape(held.shape)
            if keep:
                full_name = held.name if key is None else f"{key}.{held.name}"
                (model if key is None else optimizer)[full_name] = value.float().to("cpu", copy=True)
    scalars: dict[str, Any] = {"optimizer_step": _optimizer_step(engine)}
    if engine.dtype == torch.float16:
        scaler = engine.deepspeed.optimizer.loss_scaler
        scalars["loss_scale"] = {name: getattr(scaler, name) for name in LOSS_SCALE if hasattr(scaler, name)}
    return model, optimizer, scalars


def check(engine: Engine, model: Tensors, optimizer: Tensors) -> None:
    """CheckpointError when names or shapes are not those of the model."""
    expected = {held.name: held.shape for held in engine.parameters}
    _compare(expected, {name: tuple(value.shape) for name, value in model.items()}, "parameters")
    moments = {f"{key}.{name}": shape for name, shape in expected.items() for key in MOMENTS}
    _compare(moments, {name: tuple(value.shape) for name, value in optimizer.items()}, "optimizer states")


def put(engine: Engine, model: Tensors, optimizer: Tensors, scalars: dict[str, Any]) -> None:
    """The reverse of `take`, on every rank with all tensors. A collective. The moments must exist: `engine.prime` first."""
    write = _writer(engine)
    with torch.no_grad():
        for held in engine.parameters:
            write(held.parameter, model[held.name], None)
            for key in MOMENTS:
                write(held.parameter, optimizer[f"{key}.{held.name}"], key)
            _refresh(engine, held.parameter, model[held.name])
    for state in engine.inner_optimizer.state.values():
        state["step"].fill_(scalars["optimizer_step"])
    if "loss_scale" in scalars and engine.dtype == torch.float16:
        for name, value in scalars["loss_scale"].items():
            setattr(engine.deepspeed.optimizer.loss_scaler, name, value)


def _compare(expected: dict[str, tuple], found: dict[str, tuple], what: str) -> None:
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        lines = [
            f"  {name}: {found.get(name, 'absent')} in the checkpoint, {expected.get(name, 'absent')} in the model"
            for name in wrong[:5]
        ]
        raise CheckpointError(f"{len(wrong)} {what} of the checkpoint do not fit the model:\n" + "\n".join(lines))


def _optimizer_step(engine: Engine) -> int:
    return int(next(iter(engine.inner_optimizer.state.values()))["step"])


def _masters(engine: Engine) -> dict[nn.Parameter, torch.Tensor] | None:
    """At ZeRO 0: the tensor the optimizer updates, for each parameter (itself in fp32). None at 1 to 3.

    DeepSpeed's accessors do not work at 0; its 16-bit wrapper has the fp32 copies in `fp32_groups`.
    """
    if engine.zero > 0:
        return None
    if engine.dtype == torch.float32:
        return {held.parameter: held.parameter for held in engine.parameters}
    wrapper = engine.deepspeed.optimizer
    return {
        half: full
        for halves, fulls in zip(wrapper.fp16_groups, wrapper.fp32_groups)
        for half, full in zip(halves, fulls)
    }


def _reader(engine: Engine) -> Callable[[nn.Parameter, str | None], torch.Tensor]:
    masters = _masters(engine)
    if masters is not None:
        state = engine.inner_optimizer.state
        return lambda parameter, key: masters[parameter] if key is None else state[masters[parameter]][key]
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return lambda parameter, key: (
        safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
    )


def _writer(engine: Engine) -> Callable[[nn.Parameter, torch.Tensor, str | None], Any]:
    masters = _masters(engine)
    if masters is not None:
        state = engine.inner_optimizer.state
        return lambda parameter, value, key: (
            masters[parameter] if key is None else state[masters[parameter]][key]
        ).copy_(value)
    from deepspeed import utils

    if engine.zero == 3:

        def write(parameter: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
            # Not the setter for full values: it fails on the last rank when the size is not a multiple of the world
            # size.
            part = _part(value, parameter.ds_tensor.numel(), engine.process.grid.data)
            if key is None:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, key)

        return write

    def write_fragment(parameter: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)

    return write_fragment


def _part(value: torch.Tensor, size: int, data: Line) -> torch.Tensor:
    """This rank's part of `value` at ZeRO 3: equal parts, the end filled with zeros."""
    flat = value.flatten()
    flat = torch.nn.functional.pad(flat, (0, size * data.size - flat.numel()))
    return flat[size * data.rank : size * (data.rank + 1)].contiguous()


def _refresh(engine: Engine, parameter: nn.Parameter, value: torch.Tensor) -> None:
    """The working copy: DeepSpeed's setters write the master copy alone, and the next step would run on stale
    weights."""
    if engine.zero < 3:
        parameter.data.copy_(value)
        return
    import deepspeed

    # Not `ds_tensor` alone: small parameters are kept gathered, and would go on with their old values.
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if engine.process.is_first:
            parameter.data.copy_(value)


def select(run_folder: Path, process: Process) -> tuple[Path, dict[str, Any]] | None:
    """(folder, state) of the newest checkpoint that is whole on every rank; None when the run has none. A collective.

    Every rejected one is reported with the reason. CheckpointError, on every rank, when there are some but none is
    whole.
    """
    candidates = process.share([folder.name for folder in reader.checkpoint_folders(run_folder)])
    rejected = []
    for name in candidates:
        folder = Path(run_folder) / reader.CHECKPOINTS / name
        reason = _rejection(folder, process)
        if not process.any(reason is not None):
            return folder, process.first_only(lambda folder=folder: reader.read_state(folder))
        reason = process.first_only(lambda reason=reason: reason) or "it is not whole on another rank"
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
    """Why this rank cannot use the checkpoint. The first rank of each machine reads all of it; the others look at
    sizes."""
    try:
        reader.verify(folder, hashes=process.local_rank == 0)
    except CheckpointError as error:
        if not process.is_first:
            logger.warning("%s", error)
        return str(error)
    except (OSError, ValueError) as error:
        return f"{folder} cannot be read: {error}"
    return None


def not_finite(model: Tensors) -> Iterator[str]:
    """Names of parameters that hold a NaN or an infinity."""
    return (name for name, value in model.items() if not torch.isfinite(value).all())
