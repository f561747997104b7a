"""Checkpoints that no training writes: weights alone, in any folder; for evaluation, export and a new run's start."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.checkpoint import reader, storage
from exlm_dist.checkpoint.pieces import Piece
from exlm_dist.checkpoint.rank_files import Entries, SmallFiles, write_file, write_files
from exlm_dist.checkpoint.tensors import Index, model_file, write_header
from exlm_dist.utils.errors import CheckpointError
from exlm_dist.utils.files import sync_path

#: Tensors by file of a checkpoint and name in it.
Files = Mapping[str, Mapping[str, np.ndarray]]


def check_target(target: Path) -> None:
    """CheckpointError unless a checkpoint may be written to `target`: there is nothing, or an empty folder."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} exists. Choose another --out, or remove it yourself.")


def write_weights(
    target: Path, weights: Mapping[str, np.ndarray], *, state: Mapping[str, Any], config: str, tokenizer: Path
) -> Path:
    """Write `weights` (fp32, by canonical name) as a checkpoint without moments, whole or not at all; its folder.

    `state`: of `state.json`, with the `step`; `config`: text of the resolved config; `tokenizer`: its folder.
    CheckpointError where `target` is taken, cannot be written, or a parameter is not finite.
    """
    target = Path(os.path.abspath(target))
    check_target(target)
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"parameter {name} has values that are not finite. Nothing was written.")
    shapes = {name: array.shape for name, array in weights.items()}
    index = Index(shapes, {name: [Piece(None, 0, array.size, 0)] for name, array in weights.items()}, ())
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.mkdir(temporary)
        os.mkdir(temporary / reader.TOKENIZER_FOLDER)
        small = SmallFiles.of_run(index.as_text(), state, config, tokenizer)
        storage.seal(temporary, state["step"], write_tensor_files(temporary, {model_file(0): weights}, small))
        os.rename(temporary, target)
        sync_path(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written: {error.strerror or error}. Free space there, or choose another --out."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def write_tensor_files(folder: Path, files: Files, small: SmallFiles) -> Entries:
    """Write all files of a checkpoint but manifest and COMPLETE into `folder`, and force them to the disk. `files`:
    tensors in the shape that they have there, fp32. OSError."""
    entries = write_files(folder, [], b"", small)
    for name, tensors in files.items():
        arrays = {key: np.asarray(value, np.float32, order="C") for key, value in tensors.items()}
        header = write_header({key: value.shape for key, value in arrays.items()})
        elements = (value.reshape(-1).view(np.uint8).data for value in arrays.values())
        entries[name] = write_file(folder / name, [header, *elements])
    return entries
