"""Commands that a message advises: the one that this launch was started by, with other settings."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from exlm_dist.config import RunConfig, parse_overrides
from exlm_dist.config.schema import OptimizerConfig
from exlm_dist.utils.checkpoint_names import newest_step

ALLOW_CHANGES = "--allow-changes"


def same_command(settings: Mapping[str, str] | None = None, *, allow_changes: bool = False) -> str:
    """The command line of this launch, with other values of some `settings` (by dotted key), and the flag if it is
    asked for."""
    config, given = "CONFIG", list[str]()
    if sys.argv[1:2] == ["pretrain"]:  # else it was called from Python
        config, *given = [word for word in sys.argv[2:] if not _is_flag(word)]
    every = {**dict(parse_overrides(given)), **(settings or {})}
    overrides = [word for key, value in every.items() for word in (f"--{key}", value)]
    return shlex.join(["exlm", "pretrain", config, *overrides, *([ALLOW_CHANGES] if allow_changes else [])])


def new_run_command(config: RunConfig) -> str:
    """The command that trains a new run of these settings from the weights of the run."""
    runs, number = Path(config.runs), 2
    while (runs / f"{config.name}-{number}").exists():
        number += 1
    return same_command({"init": str(runs / config.name), "name": f"{config.name}-{number}"})


def lower_rate(config: RunConfig) -> str:
    """How to go on after a divergence: a line and the command."""
    rate = {"optimizer.lr": f"{min(config.optimizer.lr / 10, OptimizerConfig().lr):.3g}"}
    step = newest_step(Path(config.runs) / config.name)
    if step:
        text = f"To go on from the checkpoint of step {step} with a lower rate"
    else:
        text = "Nothing is saved yet; to start anew with a lower rate"
    return f"{text}:\n  {same_command(rate, allow_changes=bool(step))}"


def _is_flag(word: str) -> bool:
    """Whether this is an option of `exlm pretrain`, not a setting."""
    return word == ALLOW_CHANGES or word.startswith(("--local_rank=", "--local-rank="))
