"""Errors meant for the user: each says what is wrong, where, and how to fix it.

The exit codes are a contract with the launchers: 0 done, 2 bad configuration or arguments, 75 saved, to be
requeued, 76 retry in place, 77 data fault, 78 stop (a restart would not help).
"""

import os
import traceback
from pathlib import Path

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_SAVED = 75
EXIT_RETRY = 76
EXIT_DATA = 77
EXIT_STOP = 78
#: Environment variable that names the file to which a failing rank writes its message.
ERROR_FILE = "EXLM_ERROR_FILE"
#: Environment variable that is set if the launcher has chosen MASTER_PORT: the next attempt has another.
CHOSEN_PORT = "EXLM_CHOSEN_PORT"


class UserError(ValueError):
    """Something that the user can fix; printed without a traceback."""

    exit_code = EXIT_USAGE


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, out of range, or at odds with another."""


class OutputError(UserError):
    """An output that may not be replaced, or that cannot be written."""


class DataError(UserError):
    """Input, shards or tokenizer that cannot be used."""

    exit_code = EXIT_DATA


class CheckpointError(UserError):
    """A checkpoint or run folder that cannot be used."""

    exit_code = EXIT_STOP


class RunStopped(UserError):
    """Training that must not continue: a restart would end in the same way."""

    exit_code = EXIT_STOP


class Diverged(RunStopped):
    """Training whose numbers show that its learning rate is too high. Raised on every rank."""


def leave_message(error: BaseException | str, code: int | None = None) -> None:
    """Tell the launcher of this rank why it ends: in the file that the launcher named, and beside it the exit code if
    a restart would not help (`code`, else that of a UserError). The first message stays: the cause comes first."""
    file = os.environ.get(ERROR_FILE)
    if not file or Path(file).exists():
        return
    if isinstance(error, UserError):
        code = error.exit_code
    if code not in (None, EXIT_RETRY):
        Path(f"{file}.code").write_text(f"{code}\n")
    Path(file).write_text(error if isinstance(error, str) else _described(error))


def _described(error: BaseException) -> str:
    """The message; below it, for all but a UserError, the traceback."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"
