"""Checkpoints on disk: there whole or not at all, old ones removed. Pure files: knows no rank and no torch.

The format is described in docs/checkpoints.md and read by `exlm_dist.checkpoint.reader`. Order of a save: temporary
folder, every file with fsync, manifest with their hashes, COMPLETE with the hash of the manifest, rename, pointer
`latest`. A kill at any moment leaves either the former state or the new checkpoint; `latest` is a hint for people,
never read.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from exlm_dist.checkpoint import reader
from exlm_dist.checkpoint.rank_files import REMEDY, Entries, SaveFailed, save_failed, write_file
from exlm_dist.utils.checkpoint_names import CHECKPOINTS, COMPLETE_FILE
from exlm_dist.utils.errors import CheckpointError
from exlm_dist.utils.files import sync_path, write_atomic

LATEST = "latest"
#: Bytes beside those of the tensors: headers, state, config, and a margin for the log of the run.
SPACE_MARGIN = 16 << 20


def begin(target: Path, needed: int) -> Path:
    """Make the folder that becomes `target` when it is published.

    SaveFailed, with both figures, unless `needed` bytes and a margin are free.
    """
    free = shutil.disk_usage(target.parent).free
    if free < needed + SPACE_MARGIN:
        raise SaveFailed(
            f"a checkpoint needs {(needed + SPACE_MARGIN) / 1e6:.0f} MB but only {free / 1e6:.0f} MB are free in "
            f"{target.parent}. {REMEDY}"
        )
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.mkdir(temporary)
        os.mkdir(temporary / reader.TOKENIZER_FOLDER)
    except OSError as error:
        raise save_failed(error, temporary) from error
    return temporary


def publish(temporary: Path, target: Path, step: int, files: Entries) -> None:
    """Turn the folder of `begin`, with all `files` in it, into the checkpoint `target` of a run. SaveFailed."""
    try:
        _seal(temporary, step, files)
        for damaged in (target, _aside(target)):  # training has reached its step again
            if damaged.exists():
                _discard(damaged)
        os.rename(temporary, target)
        sync_path(target.parent)
        write_atomic(target.parent / LATEST, target.name + "\n")
    except OSError as error:
        raise save_failed(error, temporary) from error


def publish_alone(temporary: Path, target: Path, step: int, files: Entries) -> None:
    """The same for a checkpoint that belongs to no run: `target`, which is replaced, has no pointer beside it.
    SaveFailed."""
    try:
        _seal(temporary, step, files)
        if target.exists():
            _discard(target)
        os.rename(temporary, target)
        sync_path(target.parent)
    except OSError as error:
        raise save_failed(error, temporary) from error


def _seal(temporary: Path, step: int, files: Entries) -> None:
    """Check the sizes of `files`; write the manifest and, last, COMPLETE."""
    for name, entry in files.items():
        if (temporary / name).stat().st_size != entry["bytes"]:
            raise SaveFailed(f"{temporary / name} is not as long as it was written. {REMEDY}")
    manifest = {"format": reader.FORMAT, "step": step, "files": files}
    text = json.dumps(manifest, indent=2, sort_keys=True).encode()
    entry = write_file(temporary / reader.MANIFEST_FILE, [text])
    sync_path(temporary / reader.TOKENIZER_FOLDER)
    sync_path(temporary)
    write_file(temporary / COMPLETE_FILE, [entry["sha256"].encode() + b"\n"])
    sync_path(temporary)


def _discard(folder: Path) -> None:
    """Remove a checkpoint; it vanishes in one step, so that no half of it can be taken for a checkpoint."""
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def clean(run_folder: Path) -> None:
    """Remove what killed saves left behind. Call only while holding the lock of the run."""
    folder = Path(run_folder) / CHECKPOINTS
    for pattern in (".tmp-*", ".trash-*", f".{LATEST}.*"):
        for path in folder.glob(pattern):
            # Writers of a launch that is just ending may still be at work in it.
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def set_aside_newer(run_folder: Path, step: int) -> None:
    """Rename the checkpoints of later steps than `step`, at which training goes on, so that no launch takes one for the
    newest of the run. Call only while holding the lock of the run."""
    for folder in reader.checkpoint_folders(run_folder):
        if reader.step_of(folder) > step:
            shutil.rmtree(_aside(folder), ignore_errors=True)
            os.rename(folder, _aside(folder))


def _aside(folder: Path) -> Path:
    return folder.with_name(f"rejected-{folder.name}")


def retain(run_folder: Path, keep: int, best: bool) -> list[Path]:
    """Remove all but the newest `keep` whole checkpoints and, if `best`, the one with the lowest evaluation nll among
    those evaluated on as many masked tokens as the newest.

    Those that are not whole are left for inspection. Returns what was removed.
    """
    whole = [folder for folder in reader.checkpoint_folders(run_folder) if looks_whole(folder)]
    kept = set(whole[:keep])
    if best:
        evaluated = {folder: found for folder in whole if (found := reader.read_state(folder).get("evaluation"))}
        counts = [found.get("tokens") for found in evaluated.values()]
        comparable = {folder: found["nll"] for folder, found in evaluated.items() if found.get("tokens") == counts[0]}
        kept.update(sorted(comparable, key=lambda folder: comparable[folder])[:1])
    removed = [folder for folder in whole if folder not in kept]
    for folder in removed:
        _discard(folder)
    return removed


def has_whole(run_folder: Path) -> bool:
    """Whether the run has a checkpoint that looks whole (sizes, not hashes)."""
    return any(looks_whole(folder) for folder in reader.checkpoint_folders(run_folder))


def looks_whole(folder: Path) -> bool:
    """Whether marker, manifest and sizes are right (hashes are not compared)."""
    try:
        reader.verify(folder, hashes=False)
    except (CheckpointError, OSError, ValueError):
        return False
    return True
