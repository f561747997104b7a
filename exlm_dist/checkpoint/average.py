"""`exlm average`: the mean of the weights of several checkpoints of one run, as a checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.checkpoint import reader
from exlm_dist.checkpoint.tensors import TensorReader
from exlm_dist.checkpoint.weights_only import AVERAGE, check_target, write_weights
from exlm_dist.config import flatten
from exlm_dist.config.pinned import CHANGEABLE, is_among
from exlm_dist.utils.errors import ConfigError
from exlm_dist.utils.outputs import user_path

#: What `state.json` of the newest checkpoint says that is true of the average as well.
_KEPT: tuple[str, ...] = ("step", "seed", "data_fingerprint", "tokenizer_fingerprint", "config_hash", "versions")
_KEPT += ("git_commit", "parameters", "progress", "changes", "init")


def average_checkpoints(checkpoints: Sequence[Path], out: Path, weights: Sequence[float] | None = None) -> str:
    """Write the mean of checkpoints (or of runs' newest) to the folder `out`; a line that says so.

    weights: of the checkpoints, in their order, normalised here; None: all equal. Each parameter is summed in fp64 and
    rounded to fp32 once. Step, settings and tokenizer are those of the newest.

    Raises:
        ConfigError: fewer than two, or one twice; weights that are not as many positive numbers; checkpoints of other
            runs; `out` exists and is no earlier average. CheckpointError: one is not whole.
    """
    out = Path(os.path.abspath(out))
    check_target(out, AVERAGE)
    fractions = _normalised(weights, len(checkpoints))
    folders = [reader.find_checkpoint(user_path(path)) for path in checkpoints]
    _check_different(folders, out)
    readers = [TensorReader(folder) for folder in folders]
    for other in readers[1:]:
        _check_same_run(readers[0], other)
    mean = {
        name: _mean([one.whole(name, None) for one in readers], fractions).astype(np.float32)
        for name in readers[0].index.shapes
    }
    newest = max(folders, key=reader.step_of)
    state = reader.read_state(newest)
    write_weights(
        out,
        mean,
        origin={"kind": AVERAGE, "sources": [_source(*pair) for pair in zip(folders, fractions)]},
        state={key: state[key] for key in _KEPT if key in state},
        config=(newest / reader.CONFIG_FILE).read_text(encoding="utf-8"),
        tokenizer=newest / reader.TOKENIZER_FOLDER,
    )
    parts = ", ".join(f"{folder.name} x {fraction:.4g}" for folder, fraction in zip(folders, fractions))
    return f"{out}: average of {len(folders)} checkpoints ({parts}), without moments: no run resumes from it"


def _mean(arrays: Sequence[np.ndarray], fractions: Sequence[float]) -> np.ndarray:
    """Sum of fraction x array, fp64."""
    total = np.zeros(arrays[0].shape)
    for array, fraction in zip(arrays, fractions):
        total += fraction * array.astype(np.float64)
    return total


def _normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    if count < 2:
        raise ConfigError("an average needs two checkpoints or more: exlm average runs/NAME/checkpoints/step-* --out X")
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ConfigError(f"--weights has {len(weights)} numbers for {count} checkpoints. Give one for each.")
    if wrong := [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]:
        raise ConfigError(f"--weights {wrong[0]:g} must be above 0. Leave out a checkpoint that is not to count.")
    return [weight / math.fsum(weights) for weight in weights]


def _check_different(folders: Sequence[Path], out: Path) -> None:
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise ConfigError(f"{folder} is given twice. To make it count more, use --weights.")
        if folder.resolve() == out.resolve():
            raise ConfigError(f"--out {out} is one of the checkpoints to average. Choose another.")
        seen.add(folder.resolve())


def _check_same_run(first: TensorReader, other: TensorReader) -> None:
    """ConfigError, naming what differs, unless two checkpoints are of one run."""
    one, two = reader.read_config(first.folder), reader.read_config(other.folder)
    differing = ""
    for key, old in flatten(one.model).items():
        if (new := flatten(two.model)[key]) != old and not is_among(f"model.{key}", CHANGEABLE):
            differing = f"model.{key} is {old} in the one and {new} in the other"
    if not differing and first.index.shapes != other.index.shapes:
        names = first.index.shapes.items() ^ other.index.shapes.items()
        differing = f"their parameters differ (first: {min(name for name, _ in names)})"
    if not differing and _tokenizer_files(first.folder) != _tokenizer_files(other.folder):
        differing = "their tokenizers differ"
    if not differing and one.seed != two.seed:
        differing = f"seed is {one.seed} in the one and {two.seed} in the other, so they began with other weights"
    if differing:
        raise ConfigError(
            f"{first.folder} and {other.folder} are not of one run: {differing}. Only the weights of one run can be "
            "averaged."
        )


def _tokenizer_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of the tokenizer."""
    files = json.loads((folder / reader.MANIFEST_FILE).read_text())["files"]
    prefix = f"{reader.TOKENIZER_FOLDER}/"
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith(prefix)}


def _source(folder: Path, fraction: float) -> dict[str, Any]:
    about = reader.reference(folder)
    return {
        "path": about["checkpoint.path"],
        "step": reader.step_of(folder),
        "sha256": about["checkpoint.sha256"],
        "weight": fraction,
    }
