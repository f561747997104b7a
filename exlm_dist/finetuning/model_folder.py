"""The folder of a fine-tuned model: made as MODEL.partial, from which a killed fine-tuning goes on, then renamed.

MODEL/finetuned.json says what it predicts, how it was made and how good it is; config.yaml and tokenizer/ are those of
the checkpoint; member-0/, member-1/, ... have the weights (model.safetensors) and epochs (history.json) of each member.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from exlm_dist.checkpoint.reader import CONFIG_FILE, TOKENIZER_FOLDER
from exlm_dist.utils.errors import CheckpointError, ConfigError
from exlm_dist.utils.files import sha256_file, sync_path, write_json
from exlm_dist.utils.locks import lock
from exlm_dist.utils.outputs import check_writable

FORMAT = 1
FINETUNED_FILE = "finetuned.json"
WEIGHTS_FILE = "model.safetensors"
HISTORY_FILE = "history.json"
#: In MODEL.partial: what was asked for, and the state of each member after its last epoch.
STATE_FOLDER = "state"
REQUEST_FILE = "request.json"


class MemberState:
    """State of a member in one safetensors file, whose metadata has the facts that are no tensors."""

    def __init__(self, folder: Path, number: int) -> None:
        self._path = folder / STATE_FOLDER / f"member-{number}.safetensors"

    def save(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replace the state, as a whole or not at all."""
        _save_tensors(self._path, tensors, {"facts": json.dumps(facts)})

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last one; None if there is none. CheckpointError if it is damaged."""
        from safetensors import SafetensorError, safe_open

        if not self._path.exists():
            return None
        try:
            with safe_open(self._path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])
        except SafetensorError as error:
            raise CheckpointError(
                f"{self._path}: damaged ({error}). Remove it, and this member begins anew: "
                f"rm {shlex.quote(str(self._path))}"
            ) from error


def partial_folder(out: Path) -> Path:
    """Where the model is while it is made."""
    return out.with_name(f"{out.name}.partial")


def check_free(out: Path) -> None:
    """ConfigError if something is at `out` already; OutputError if nothing can be written there."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: exists. Choose another --out, or remove it: rm -r {shlex.quote(str(out))}")
    check_writable(out)


@contextmanager
def open_partial(out: Path, request: Mapping[str, Any]) -> Iterator[Path]:
    """MODEL.partial, new or that of an earlier, killed call that asked for the same; nobody else writes in it
    meanwhile. ConfigError if it was begun with another `request`, which names the differences."""
    folder = partial_folder(out)
    state = folder / STATE_FOLDER
    try:
        state.mkdir(parents=True, exist_ok=True)
        handle = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}. Choose another --out.") from error
    try:
        try:
            lock(handle, state)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another `exlm finetune` is writing there. Choose another --out.") from None
        if (state / REQUEST_FILE).exists():
            _check_same(folder, json.loads((state / REQUEST_FILE).read_text()), request)
        else:
            write_json(state / REQUEST_FILE, request)
        yield folder
    finally:
        os.close(handle)


def copy_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Take settings and tokenizer of the checkpoint into the model, so that it needs nothing else."""
    shutil.copyfile(checkpoint / CONFIG_FILE, folder / CONFIG_FILE)
    shutil.copytree(checkpoint / TOKENIZER_FOLDER, folder / TOKENIZER_FOLDER, dirs_exist_ok=True)


def save_member(folder: Path, number: int, weights: Mapping[str, Tensor], history: list[dict[str, Any]]) -> str:
    """Write the files of a member; the SHA-256 of its weights."""
    own = member_folder(folder, number)
    own.mkdir(exist_ok=True)
    _save_tensors(own / WEIGHTS_FILE, {name: value.detach() for name, value in weights.items()}, {})
    write_json(own / HISTORY_FILE, without_nan(history))
    return sha256_file(own / WEIGHTS_FILE)


def member_folder(folder: Path, number: int) -> Path:
    """Folder of a member, counted from 0."""
    return folder / f"member-{number}"


def load_member(folder: Path, number: int, sha256: str) -> dict[str, Tensor]:
    """Weights of a member. CheckpointError if its file is missing or damaged."""
    from safetensors.torch import load_file

    path = member_folder(folder, number) / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the model is not whole. Copy it again, or fine-tune once more.")
    if sha256_file(path) != sha256:
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not that in {FINETUNED_FILE}. Copy it again, or fine-tune once more."
        )
    return load_file(path)


def is_model_folder(path: Path | str) -> bool:
    """Whether `path` is a folder that `exlm finetune` wrote."""
    return (Path(path) / FINETUNED_FILE).is_file()


def refuse_model(checkpoint: Path | str) -> None:
    """CheckpointError for a fine-tuned model where a checkpoint is wanted."""
    if is_model_folder(checkpoint):
        origin = read_finetuned(Path(checkpoint))["checkpoint"]["path"]
        raise CheckpointError(
            f"{checkpoint} is a fine-tuned model, not a checkpoint to start from. Give that of the pretraining; this "
            f"one was made from {origin}."
        )


def read_finetuned(folder: Path) -> dict[str, Any]:
    """`finetuned.json` of a model. CheckpointError if there is none, or it is of another format."""
    path = folder / FINETUNED_FILE
    if not path.is_file():
        partial = folder.name.endswith(".partial") or partial_folder(folder).is_dir()
        why = (
            "its fine-tuning has not ended: give the same `exlm finetune` again"
            if partial
            else "exlm finetune makes one"
        )
        raise CheckpointError(f"{folder} is no fine-tuned model: it has no {FINETUNED_FILE} ({why}).")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Copy it again, or fine-tune once more.") from error
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is of format {content.get('format')}; this version of exlm_dist reads format {FORMAT}."
        )
    return content


def publish(folder: Path, out: Path, finetuned: Mapping[str, Any]) -> None:
    """Complete the model and rename it to `out`. ConfigError if something has appeared there."""
    write_json(folder / FINETUNED_FILE, without_nan(finetuned))
    check_free(out)
    os.replace(folder, out)
    sync_path(out.parent)
    shutil.rmtree(out / STATE_FOLDER)


def without_nan(value: Any) -> Any:
    """`value` with None for every float that is not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)
    sync_path(temporary)
    os.replace(temporary, path)
    sync_path(path.parent)


def _check_same(folder: Path, begun: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    if begun == request:
        return
    names = sorted(name for name in {*begun, *request} if begun.get(name) != request.get(name))
    changes = "; ".join(f"{name} was {begun.get(name)!r}, now {request.get(name)!r}" for name in names)
    raise ConfigError(
        f"{folder} was begun with other settings ({changes}). Give those it was begun with and it goes on, choose "
        f"another --out, or begin anew: rm -r {shlex.quote(str(folder))}"
    )
