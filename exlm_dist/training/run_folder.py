"""The folder of a run: who may write it, and what it says of the run when a launch begins."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from exlm_dist.checkpoint import storage
from exlm_dist.config import RunConfig, config_difference, dump_config, load_stored
from exlm_dist.tracking import EVENTS, EventLog
from exlm_dist.utils.checkpoint_names import CHECKPOINTS
from exlm_dist.utils.errors import CheckpointError, ConfigError
from exlm_dist.utils.files import write_atomic
from exlm_dist.utils.locks import lock

CONFIG = "config.yaml"
LOCK = ".lock"
#: Seconds to wait for the processes of a run that was just killed to be gone.
LOCK_PATIENCE = 10.0


class RunFolder:
    """An opened run folder, locked against a second writer until `close` or the end of the process."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._lock = handle

    @staticmethod
    def open(config: RunConfig, *, patience: float = LOCK_PATIENCE) -> RunFolder:
        """Create `<runs>/<name>`, or take what is there. CheckpointError when another process writes it."""
        path = Path(config.runs) / config.name
        try:
            (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            return RunFolder(path, _lock(path, patience))
        except OSError as error:
            raise CheckpointError(
                f"the run folder {path} cannot be made or written: {error.strerror}. Set `runs` to a folder you may "
                "write."
            ) from error

    def close(self) -> None:
        """Let others write."""
        os.close(self._lock)


def record_start(path: Path, config: RunConfig, step: int) -> None:
    """Let the run folder `path` say that its run goes on after `step` steps with these settings: of the event log only
    what belongs to these weights stands, `config.yaml` is that of this launch, and newer checkpoints, which were
    rejected, are set aside.

    A run that starts at step 0 is bound by nothing that is in the folder. With other settings than the start before,
    which came to nothing, it is another run to MLflow.
    """
    file = path / CONFIG
    if (path / EVENTS).exists():
        log = EventLog(path / EVENTS)
        if step == 0 and _is_another_run(file, config):
            log.begin_again()
        else:
            log.resumed(step)
        log.close()
    storage.set_aside_newer(path, step)
    text = dump_config(config)
    if not file.exists() or file.read_text() != text:
        write_atomic(file, text)


def _is_another_run(file: Path, config: RunConfig) -> bool:
    try:
        return bool(config_difference(load_stored(file), config))
    except ConfigError:  # missing, cut short, or of another version
        return True


def _lock(path: Path, patience: float) -> int:
    """An exclusive lock, where the file system has locks."""
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + patience
    while True:
        try:
            lock(handle, path / LOCK)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                owner = os.pread(handle, 1000, 0).decode(errors="replace").strip()
                os.close(handle)
                raise CheckpointError(
                    f"{path} is being written by another process ({owner}). "
                    "Wait for it, end it, or give this run another `name`."
                ) from None
            time.sleep(0.1)
    os.ftruncate(handle, 0)
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.pwrite(handle, json.dumps(about).encode(), 0)
    return handle
