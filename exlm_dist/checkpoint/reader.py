"""Reading a checkpoint: verify, weights, state. The one reader of the format, for training (resume), evaluation,
analysis and export alike; it knows no rank and imports no DeepSpeed.

A checkpoint is a folder (those of a run are `checkpoints/step-00001000/`) with the pieces of parameters and moments
(`exlm_dist.checkpoint.tensors`), `state.json`, `config.yaml`, `tokenizer/`, `manifest.json`
(`{"format": 2, "files": {relative path: {"sha256": hex, "bytes": int}}, ...}`) and `COMPLETE` (the SHA-256 of
`manifest.json` and a line end). No pickle is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exlm_dist.checkpoint.tensors import INDEX_FILE, Index, TensorReader, tensor_name
from exlm_dist.utils.checkpoint_names import CHECKPOINTS, COMPLETE_FILE, step_in_name
from exlm_dist.utils.errors import CheckpointError
from exlm_dist.utils.files import sha256_file
from exlm_dist.utils.logs import get_logger

if TYPE_CHECKING:
    import torch

    from exlm_dist.config import RunConfig

FORMAT = 2
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
TOKENIZER_FOLDER = "tokenizer"
MANIFEST_FILE = "manifest.json"

logger = get_logger(__name__)


def step_of(folder: Path) -> int:
    """Step of a checkpoint: that in the name `step-00001000`, else that of its `state.json`; CheckpointError where
    neither tells it."""
    step = step_in_name(folder)
    if step is not None:
        return step
    try:
        return int(read_state(folder)["step"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} is no checkpoint folder: neither its name (step-00001000) nor its {STATE_FILE} tells the step."
        ) from error


def run_folder_of(folder: Path) -> Path | None:
    """The run folder whose training wrote a checkpoint, as its place tells; None for one that lies elsewhere."""
    folder = Path(folder).resolve()
    inside = folder.parent.name == CHECKPOINTS and step_in_name(folder) is not None
    return folder.parent.parent if inside else None


def is_checkpoint(folder: Path) -> bool:
    """Whether this is a checkpoint, whole or not, and no run folder or anything else."""
    files = (INDEX_FILE, STATE_FILE)
    return step_in_name(folder) is not None or any((Path(folder) / name).is_file() for name in files)


def checkpoint_folders(run_folder: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, whole or not."""
    folders = [path for path in (Path(run_folder) / CHECKPOINTS).glob("step-*") if step_in_name(path) is not None]
    return sorted((path for path in folders if path.is_dir()), key=step_of, reverse=True)


def verify(folder: Path, *, hashes: bool = True, split: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """The manifest of a whole checkpoint; CheckpointError naming the first thing that is wrong.

    Checks the COMPLETE marker, the manifest against it, and size and SHA-256 of every file. `hashes=False`: sizes only.
    `split` (i, n): only the hashes of every n-th file from the i-th on, for n ranks that divide up the reading.
    """
    folder = Path(folder)
    if not (folder / COMPLETE_FILE).is_file():
        raise _unusable(folder, f"it has no {COMPLETE_FILE} marker (killed while saving?)")
    manifest_path = folder / MANIFEST_FILE
    if not manifest_path.is_file():
        raise _unusable(folder, f"{MANIFEST_FILE} is missing")
    if f"{sha256_file(manifest_path)}\n".encode() != (folder / COMPLETE_FILE).read_bytes():
        raise _unusable(folder, f"{MANIFEST_FILE} does not have the hash in {COMPLETE_FILE}")
    manifest = json.loads(manifest_path.read_text())
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"Checkpoint {folder} is of format {manifest['format']}; this version of exlm_dist reads format {FORMAT}. "
            f"Use the version that wrote it ({STATE_FILE} names it)."
        )
    for number, (name, entry) in enumerate(sorted(manifest["files"].items())):
        _verify_file(folder, name, entry, hashes and number % split[1] == split[0])
    return manifest


def _verify_file(folder: Path, name: str, entry: dict[str, Any], hashes: bool) -> None:
    path = folder / name
    if not path.is_file():
        raise _unusable(folder, f"{name} is missing")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise _unusable(folder, f"{name} has {size} bytes, not {entry['bytes']}")
    if hashes and sha256_file(path) != entry["sha256"]:
        raise _unusable(folder, f"{name} is damaged: its SHA-256 is not that of the manifest")


def _unusable(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(f"Checkpoint {folder} cannot be used: {why}. Use another checkpoint of the run.")


def newest_checkpoint(run_folder: Path) -> Path:
    """Newest whole checkpoint of a run. Each newer one that is rejected is reported with the reason.

    CheckpointError when none is whole.
    """
    rejected = []
    for folder in checkpoint_folders(run_folder):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            logger.warning("%s", error)
            rejected.append(folder.name)
    found = f"rejected: {', '.join(rejected)}" if rejected else "there is none"
    raise CheckpointError(
        f"No whole checkpoint in {Path(run_folder) / CHECKPOINTS} ({found}). Train first: exlm pretrain."
    )


def find_checkpoint(path: Path) -> Path:
    """`path` itself when it is a checkpoint (verified), else the newest whole checkpoint of the run folder `path`."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder. Give a run folder (runs/NAME) or a checkpoint in it.")
    if is_checkpoint(path):
        verify(path)
        return path
    return newest_checkpoint(path)


def load_weights(folder: Path, *, verified: bool = False) -> dict[str, torch.Tensor]:
    """fp32 parameters by canonical name, on the CPU. The folder is verified first unless the caller has done so."""
    return _load_tensors(folder, verified, lambda index: [None])


def load_optimizer(folder: Path, *, verified: bool = False) -> dict[str, torch.Tensor]:
    """Moments of the optimizer, `exp_avg.<name>` and `exp_avg_sq.<name>`, fp32, on the CPU."""
    return _load_tensors(folder, verified, lambda index: index.moments)


def _load_tensors(
    folder: Path, verified: bool, which: Callable[[Index], Sequence[str | None]]
) -> dict[str, torch.Tensor]:
    import torch

    if not verified:
        verify(folder)
    tensors = TensorReader(folder)
    return {
        tensor_name(name, moment): torch.from_numpy(tensors.whole(name, moment))
        for moment in which(tensors.index)
        for name in tensors.index.shapes
    }


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json`: step, counters, fingerprints."""
    return json.loads((Path(folder) / STATE_FILE).read_text())


def read_config(folder: Path) -> RunConfig:
    """The resolved config that the checkpoint (or run folder) was written with."""
    from exlm_dist.config import load_stored  # not above: the process that writes checkpoints starts faster without

    return load_stored(Path(folder) / CONFIG_FILE)


def reference(folder: Path) -> dict[str, str]:
    """What is logged about a checkpoint instead of its files: `checkpoint.step`, `.path`, and `.sha256` of the index
    and the files of the weights."""
    files = json.loads((Path(folder) / MANIFEST_FILE).read_text())["files"]
    weights = [name for name in sorted(files) if name == INDEX_FILE or name.startswith("model-")]
    digest = hashlib.sha256("".join(f"{files[name]['sha256']}  {name}\n" for name in weights).encode()).hexdigest()
    return {
        "checkpoint.step": str(step_of(folder)),
        "checkpoint.path": str(Path(folder).resolve()),
        "checkpoint.sha256": digest,
    }
