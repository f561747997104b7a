"""Tiny runs in real processes, and ways to kill them."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from made_run import make_config
from parallel.harness import RankFailed, run_processes

from exlm_dist.checkpoint import reader
from exlm_dist.config import RunConfig

CRASH_POINTS = Path(__file__).resolve().parents[1] / "crash_points"


def tiny(runs: Path, name: str, data: Path, **sections: Any) -> RunConfig:
    """12 steps of 8 sequences with dropout on, saved every 4 steps."""
    settings: dict[str, Any] = {
        "schedule": {"steps": 12, "warmup": 2},
        "batch": {"sequences": 8, "micro": 2},
        "checkpoint": {"every": 4, "keep": 2},
        "evaluation": {"every": 6, "sequences": 10},
        "optimizer": {"lr": 1e-2, "clip": 1.0},
        "tracking": {"mlflow": False, "system": False, "every": 3},
        "launch": {"timeout": 20, "device": "cpu", "threads": 1},
    }
    model = {
        "layers": 2,
        "width": 16,
        "heads": 2,
        "ffn": 32,
        "states": 2,
        "max_positions": 128,
        "dropout": 0.1,
        "attention_dropout": 0.1,
    }
    for section, values in sections.items():
        if section == "model":
            model |= values
        else:
            settings[section] = {**settings.get(section, {}), **values} if isinstance(values, Mapping) else values
    return make_config(runs, name, data, model=model, **settings)


def train_on(
    config: RunConfig, world: int, death: tuple | None = None, *, timeout: float = 90.0, allow_changes: bool = False
) -> list[int]:
    """Exit codes of `train(config)` on `world` real processes.

    `death`: ("step", rank, n) kills a rank with SIGKILL before its step n; ("signal", rank, n, number) sends it a
    signal; ("writer", rank, point) makes the process that writes its checkpoints fail (tests/crash_points); with
    "slow" in the place of "writer" that process only lags behind.
    """
    try:
        return run_processes(_train, world, config.model_dump(), death, allow_changes, timeout=timeout)
    except RankFailed as failure:
        if death is not None and death[0] != "signal":
            print(failure)  # shown if the test then fails
            return failure.codes
        raise


def _train(rank: int, settings: dict[str, Any], death: tuple | None, allow_changes: bool = False) -> int:
    from exlm_dist.training.loop import train
    from exlm_dist.utils.logs import configure_logging

    # Ranks inherit standard error from the server they are forked from, which has that of the first test.
    os.dup2(os.open(f"{settings['runs']}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    configure_logging("WARNING")
    if death is not None and death[0] != "slow":
        _finish_saves_before_steps()
    if death is not None and death[1] == rank:
        if death[0] in ("writer", "slow"):
            _crash_writer(settings["runs"], death[2])
        else:
            {"step": _die_at_step, "signal": _signal_at_step}[death[0]](*death[2:])
    return train(RunConfig.model_validate(settings), allow_changes=allow_changes)


def _before_step(action: Any) -> None:
    from exlm_dist.training.session import Session

    plain = Session.train_step

    def train_step(session: Session) -> None:
        action(session.step)
        plain(session)

    Session.train_step = train_step


def _finish_saves_before_steps() -> None:
    """So that earlier saves are done when a rank dies at step n: these steps take milliseconds."""
    from exlm_dist.training.checkpointer import Checkpointer

    plain = Checkpointer.attend

    def attend(checkpointer: Checkpointer) -> None:
        while checkpointer.saving:
            plain(checkpointer)

    Checkpointer.attend = attend


def _die_at_step(number: int) -> None:
    _before_step(lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == number else None)


def _signal_at_step(number: int, which: int) -> None:
    _before_step(lambda step: os.kill(os.getpid(), which) if step == number else None)


def _crash_writer(runs: str, point: str) -> None:
    file = Path(runs) / "crash_point"
    file.write_text(point)
    os.environ["EXLM_CRASH_POINT"] = str(file)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(CRASH_POINTS), os.environ.get("PYTHONPATH", "")])


def log_of(config: RunConfig) -> str:
    """What the ranks wrote to standard error."""
    return (Path(config.runs) / "log").read_text()


def final_hashes(config: RunConfig) -> dict[str, str]:
    """SHA-256 of every parameter and moment after the last step, whatever layout wrote them."""
    folder = Path(config.runs) / config.name / reader.CHECKPOINTS / f"step-{config.schedule.steps:08d}"
    tensors = reader.load_weights(folder) | reader.load_optimizer(folder)
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in sorted(tensors.items())}
