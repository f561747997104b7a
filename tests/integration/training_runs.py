"""Tiny runs in real processes, and ways to make them die."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from made_run import make_config
from parallel.harness import RankFailed, run_processes

from exlm_dist.config import RunConfig
from exlm_dist.model import checkpoint_reader as reader


def tiny(runs: Path, name: str, data: Path, **sections: Any) -> RunConfig:
    """12 steps of 8 sequences with dropout on, saved every 4."""
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


def train_on(config: RunConfig, world: int, death: tuple | None = None, *, timeout: float = 90.0) -> list[int]:
    """Exit codes of `train(config)` on `world` real processes. `death`: ("step", rank, n) kills a rank before its step
    n with
    SIGKILL, ("call", rank, name, n) at the n-th time it calls os.`name` while saving; ("signal", rank, n, number)
    sends a signal."""
    try:
        return run_processes(_train, world, config.model_dump(), death, timeout=timeout)
    except RankFailed as failure:
        if death is not None and death[0] != "signal":
            return failure.codes
        raise


def _train(rank: int, settings: dict[str, Any], death: tuple | None) -> int:
    from exlm_dist.training.loop import train
    from exlm_dist.utils.logs import configure_logging

    # The server that the ranks are forked from has kept the standard error of the first test.
    os.dup2(os.open(f"{settings['runs']}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    configure_logging("WARNING")
    if death is not None and death[1] == rank:
        {"step": _die_at_step, "call": _die_at_call, "signal": _signal_at_step}[death[0]](*death[2:])
    return train(RunConfig.model_validate(settings))


def _before_step(action: Any) -> None:
    from exlm_dist.training.session import Session

    plain = Session.train_step

    def train_step(session: Session) -> None:
        action(session.step)
        plain(session)

    Session.train_step = train_step


def _die_at_step(number: int) -> None:
    _before_step(lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == number else None)


def _signal_at_step(number: int, which: int) -> None:
    _before_step(lambda step: os.kill(os.getpid(), which) if step == number else None)


def _die_at_call(name: str, number: int) -> None:
    """Counts only calls made inside `write_checkpoint`."""
    from exlm_dist.training import checkpoint_files

    plain_write, plain_call = checkpoint_files.write_checkpoint, getattr(os, name)
    calls = {"inside": False, "count": 0}

    def call(*arguments: Any, **keywords: Any) -> Any:
        if calls["inside"]:
            calls["count"] += 1
            if calls["count"] == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return plain_call(*arguments, **keywords)

    def write(*arguments: Any, **keywords: Any) -> Path:
        calls["inside"] = True
        try:
            return plain_write(*arguments, **keywords)
        finally:
            calls["inside"] = False

    setattr(os, name, call)
    checkpoint_files.write_checkpoint = write


def log_of(config: RunConfig) -> str:
    """What the ranks wrote to standard error."""
    return (Path(config.runs) / "log").read_text()


def final_hashes(config: RunConfig) -> dict[str, str]:
    """SHA-256 of parameters and of optimizer state after the last step."""
    folder = Path(config.runs) / config.name / reader.CHECKPOINTS / f"step-{config.schedule.steps:08d}"
    files = reader.verify(folder)["files"]
    return {name: files[name]["sha256"] for name in (reader.MODEL_FILE, reader.OPTIMIZER_FILE)}
