"""A checkpoint that a command makes, not training: weights without moments, in a folder of any name outside a run. All
that reads checkpoints takes it, but no run resumes from it. Its `state.json` says under `origin` what it was made of.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.checkpoint import reader, storage
from exlm_dist.checkpoint.pieces import Piece
from exlm_dist.checkpoint.rank_files import Entries, SmallFiles, save_failed, write_file, write_files
from exlm_dist.checkpoint.tensors import Index, model_file, write_header
from exlm_dist.utils.checkpoint_names import step_in_name
from exlm_dist.utils.errors import CheckpointError, ConfigError
from exlm_dist.utils.outputs import check_writable, must_stay

#: Values of `origin.kind`.
AVERAGE, FAIRSEQ = "average", "fairseq"
_MADE_BY = {AVERAGE: "exlm average", FAIRSEQ: "exlm import fairseq"}


def check_target(out: Path, kind: str) -> None:
    """ConfigError unless `out` is free, an empty folder, or an earlier checkpoint of the same `kind`, which
    `write_weights` replaces; OutputError if nothing can be written there."""
    out = Path(os.path.realpath(out))
    if step_in_name(out) is not None:
        raise ConfigError(
            f"--out {out}: only training writes folders of this name, and resumes from them. Choose another."
        )
    check_writable(out)
    if must_stay(out):
        raise ConfigError(f"--out {out}: cannot be replaced as a whole (a mount point?). Name one in it: {out}/{kind}.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())) or _kind_of(out) == kind:
        return
    raise ConfigError(
        f"--out {out} exists and is no earlier output of `{_MADE_BY[kind]}`. Choose another, or remove it yourself."
    )


def write_weights(
    out: Path,
    weights: Mapping[str, np.ndarray],
    *,
    origin: Mapping[str, Any],
    state: Mapping[str, Any],
    config: str,
    tokenizer: Path,
) -> None:
    """Write a checkpoint of fp32 `weights` by canonical name to `out`: whole or not at all.

    origin: `kind` and what it was made of; state: the rest of `state.json`, `step` among it; config: text of
    `config.yaml`; tokenizer: its folder. ConfigError as in `check_target`, CheckpointError for a parameter that is not
    finite, SaveFailed.
    """
    out = Path(os.path.realpath(out))
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"parameter {name} has values that are not finite; {out} was not written.")
    check_target(out, origin["kind"])
    index = Index(
        {name: array.shape for name, array in weights.items()},
        {name: [Piece(None, 0, array.size, 0)] for name, array in weights.items()},
        moments=(),
    )
    small = SmallFiles.of_run(index.as_text(), {**state, "origin": origin}, config, tokenizer)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise save_failed(error, out.parent) from error
    temporary = storage.begin(out, 4 * sum(array.size for array in weights.values()))
    try:
        entries = write_arrays(temporary, {model_file(0): weights}, small)
        check_target(out, origin["kind"])
        storage.publish_alone(temporary, out, state["step"], entries)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_arrays(folder: Path, files: Mapping[str, Mapping[str, np.ndarray]], small: SmallFiles) -> Entries:
    """Write fp32 arrays by name, by file, and `small` into the folder of `storage.begin`. SaveFailed."""
    entries = write_files(folder, [], b"", small)
    try:
        for file, arrays in files.items():
            flat = (np.ascontiguousarray(array, np.float32).reshape(-1) for array in arrays.values())
            header = write_header({name: array.shape for name, array in arrays.items()})
            entries[file] = write_file(folder / file, [header, *(array.view(np.uint8).data for array in flat)])
    except OSError as error:
        raise save_failed(error, folder) from error
    return entries


def describe_origin(state: Mapping[str, Any]) -> str:
    """What a checkpoint with this `state.json` was made of, in a line; empty for one that training wrote."""
    origin = state.get("origin")
    if origin is None:
        return ""
    if origin["kind"] == FAIRSEQ:
        return f"import of fairseq weights ({origin['file']}, SHA-256 {origin['sha256'][:12]})"
    parts = ", ".join(f"step {source['step']} x {source['weight']:.4g}" for source in origin["sources"])
    return f"average of {len(origin['sources'])} checkpoints ({parts})"


def _kind_of(folder: Path) -> str | None:
    """`origin.kind` of a checkpoint; None where there is none."""
    try:
        reader.verify(folder, hashes=False)
        return reader.read_state(folder)["origin"]["kind"]
    except (CheckpointError, OSError, ValueError, KeyError):
        return None
