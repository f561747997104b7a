"""Checkpoints on disk: written whole or not at all, selected, thinned out. Pure files: knows no rank and no DeepSpeed.

The format is described in docs/checkpoints.md and read by `exlm_dist.model.checkpoint_reader`. Order of a save:
temporary
folder, every file with fsync, manifest with their hashes, COMPLETE with the hash of the manifest, rename, pointer
`latest`.
A kill at any moment leaves either the former state or the new checkpoint; `latest` is a hint for people, never read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from exlm_dist.model import checkpoint_reader as reader
from exlm_dist.utils.errors import CheckpointError
from exlm_dist.utils.files import sync_directory, write_atomic
from exlm_dist.utils.logs import get_logger

LATEST = "latest"
FORMAT = 1
#: Beside the tensors: headers, state, config, and a margin for the log of the run.
SPACE_MARGIN = 16 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Tensors = Mapping[str, torch.Tensor]
logger = get_logger(__name__)


class DiskFull(CheckpointError):
    """There is no room for a checkpoint. Nothing was left behind, older checkpoints are untouched."""


def folder_of(run_folder: Path, step: int) -> Path:
    """`checkpoints/step-00001000` of a run."""
    return Path(run_folder) / reader.CHECKPOINTS / f"step-{step:08d}"


def write_checkpoint(
    run_folder: Path,
    step: int,
    *,
    model: Tensors,
    optimizer: Tensors,
    state: Mapping[str, Any],
    config: str,
    tokenizer: Path,
) -> Path:
    """Publish the checkpoint of `step` and return its folder. DiskFull or CheckpointError: nothing of it is left.

    `model`: fp32 parameters by canonical name; `optimizer`: `exp_avg.<name>`, `exp_avg_sq.<name>`; `tokenizer`: its
    folder.
    """
    target = folder_of(run_folder, step)
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        ensure_space(target.parent, sum(tensor.numel() * 4 for part in (model, optimizer) for tensor in part.values()))
        temporary.mkdir()
        _fill(temporary, model, optimizer, state, config, Path(tokenizer))
        _publish(temporary, target)
    except OSError as error:
        kind = DiskFull if error.errno in _FULL else CheckpointError
        raise kind(
            f"checkpoint of step {step} could not be written to {target.parent}: {error.strerror or error}. "
            "Older checkpoints are untouched. Free space there, or lower checkpoint.keep."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def ensure_space(folder: Path, needed: int) -> None:
    """DiskFull, with both numbers, unless `needed` bytes and a margin are free in the file system of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPACE_MARGIN:
        raise DiskFull(
            f"a checkpoint needs {(needed + SPACE_MARGIN) / 1e6:.0f} MB but only {free / 1e6:.0f} MB are free in "
            f"{folder}. Older checkpoints are untouched. Free space there, or lower checkpoint.keep."
        )


def _fill(
    folder: Path, model: Tensors, optimizer: Tensors, state: Mapping[str, Any], config: str, tokenizer: Path
) -> None:
    files = {
        reader.MODEL_FILE: _write_file(folder / reader.MODEL_FILE, lambda put: put_safetensors(model, put)),
        reader.OPTIMIZER_FILE: _write_file(folder / reader.OPTIMIZER_FILE, lambda put: put_safetensors(optimizer, put)),
    }
    small = {
        reader.STATE_FILE: json.dumps(state, indent=2, sort_keys=True).encode() + b"\n",
        reader.CONFIG_FILE: config.encode(),
    }
    (folder / reader.TOKENIZER_FOLDER).mkdir()
    for path in sorted(path for path in tokenizer.iterdir() if path.is_file()):
        small[f"{reader.TOKENIZER_FOLDER}/{path.name}"] = path.read_bytes()
    for name, content in small.items():
        files[name] = _write_file(folder / name, lambda put, content=content: put(content))
    manifest = {"format": FORMAT, "step": state["step"], "files": files}
    entry = _write_file(
        folder / reader.MANIFEST_FILE, lambda put: put(json.dumps(manifest, indent=2, sort_keys=True).encode())
    )
    sync_directory(folder / reader.TOKENIZER_FOLDER)
    sync_directory(folder)
    _write_file(folder / reader.COMPLETE_FILE, lambda put: put(entry["sha256"].encode() + b"\n"))
    sync_directory(folder)


def _write_file(path: Path, fill: Callable[[Callable[[Any], None]], None]) -> dict[str, Any]:
    """Write a file through `fill(put)`, force it to the disk, and return its size and SHA-256."""
    digest = hashlib.sha256()
    with open(path, "xb") as file:

        def put(data: Any) -> None:
            file.write(data)
            digest.update(data)

        fill(put)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def put_safetensors(tensors: Tensors, put: Callable[[Any], None]) -> None:
    """Write fp32 `tensors` in the safetensors format, one at a time, in the order of their names.

    (The library's own writer reports a full disk as text; this one raises OSError, and is hashed as it goes.)
    """
    header: dict[str, Any] = {}
    offset = 0
    for name in sorted(tensors):
        assert tensors[name].dtype == torch.float32, name
        end = offset + tensors[name].numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    put(len(text).to_bytes(8, "little") + text)
    for name in sorted(tensors):
        put(memoryview(tensors[name].detach().cpu().contiguous().reshape(-1).numpy()).cast("B"))


def _publish(temporary: Path, target: Path) -> None:
    if target.exists():  # a damaged one that training has now passed again
        _discard(target)
    os.rename(temporary, target)
    sync_directory(target.parent)
    write_atomic(target.parent / LATEST, target.name + "\n")


def _discard(folder: Path) -> None:
    """Remove a checkpoint; it vanishes in one step, so no half of it can be taken for a checkpoint."""
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def clean(run_folder: Path) -> None:
    """Remove what killed saves left behind. Call only while holding the lock of the run."""
    folder = Path(run_folder) / reader.CHECKPOINTS
    for pattern in (".tmp-*", ".trash-*", f".{LATEST}.*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def retain(run_folder: Path, keep: int, best: bool) -> list[Path]:
    """Remove all but the newest `keep` whole checkpoints and, if `best`, the one with the lowest evaluation nll.

    Those that are not whole are left for people to look at. Returns what was removed.
    """
    whole = [folder for folder in reader.checkpoint_folders(run_folder) if _looks_whole(folder)]
    kept = set(whole[:keep])
    if best:
        scores = {folder: evaluation_nll(folder) for folder in whole}
        scored = [folder for folder in whole if scores[folder] is not None]
        kept.update(sorted(scored, key=lambda folder: scores[folder])[:1])
    removed = [folder for folder in whole if folder not in kept]
    for folder in removed:
        _discard(folder)
    return removed


def has_whole(run_folder: Path) -> bool:
    """Whether the run has a checkpoint that looks whole (sizes, not hashes)."""
    return any(_looks_whole(folder) for folder in reader.checkpoint_folders(run_folder))


def _looks_whole(folder: Path) -> bool:
    try:
        reader.verify(folder, hashes=False)
    except (CheckpointError, OSError, ValueError):
        return False
    return True


def evaluation_nll(folder: Path) -> float | None:
    """nll per masked token on the held-out split at the step of this checkpoint, if it was measured there."""
    evaluation = reader.read_state(folder).get("evaluation")
    return evaluation["nll"] if evaluation else None
