"""The folder of a run: who may write it, and whether this configuration may continue what is in it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from exlm_dist.config import RunConfig, config_difference, dump_config, load_config
from exlm_dist.utils.checkpoint_names import CHECKPOINTS
from exlm_dist.utils.errors import CheckpointError
from exlm_dist.utils.files import write_atomic

CONFIG = "config.yaml"
LOCK = ".lock"
#: Seconds to wait for the processes of a run that was just killed to be gone.
LOCK_PATIENCE = 10.0


class RunFolder:
    """An opened run folder, locked against a second writer until `close` or the end of the process."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @staticmethod
    def open(config: RunConfig, *, patience: float = LOCK_PATIENCE) -> RunFolder:
        """Create or continue `<runs>/<name>`. CheckpointError when another process writes it, or its run is a
        different one."""
        path = Path(config.runs) / config.name
        try:
            (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the run folder {path} cannot be made: {error.strerror}. Set `runs` to a folder you may write."
            ) from error
        folder = RunFolder(path, _lock(path, patience))
        try:
            folder._accept(config)
        except BaseException:
            folder.close()
            raise
        return folder

    def _accept(self, config: RunConfig) -> None:
        file = self.path / CONFIG
        if file.exists():
            different = config_difference(load_config(file, []), config)
            if different:
                raise CheckpointError(
                    f"{self.path} holds a run with other settings:\n{difference_table(different)}\n"
                    "Give the new run another `name`, or put these settings back to continue this one."
                )
        text = dump_config(config)
        if not file.exists() or file.read_text() != text:
            write_atomic(file, text)

    def close(self) -> None:
        """Let others write."""
        os.close(self._lock)


def difference_table(different: list[tuple[str, object, object]]) -> str:
    """Aligned lines `key  there  here`."""
    rows = [("setting", "in the run folder", "given now"), *((key, str(old), str(new)) for key, old, new in different)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _lock(path: Path, patience: float) -> int:
    """Exclusive lock that the kernel gives back when the process ends, however it ends."""
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
