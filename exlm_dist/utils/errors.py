"""Errors meant for the user: each says what is wrong, where, and how to mend it.

The exit codes are a contract with the launchers: 0 done, 2 bad configuration or arguments, 75 saved and wants to be
requeued, 76 retry in place, 77 data fault, 78 stop (restarting would not help).
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
#: Environment variable that names the file in which a failing rank leaves its message.
ERROR_FILE = "EXLM_ERROR_FILE"
#: Environment variable that is set where the launcher has chosen MASTER_PORT: the next attempt has another one.
CHOSEN_PORT = "EXLM_CHOSEN_PORT"


class UserError(ValueError):
    """Something the user can mend; printed without a traceback."""

    exit_code = EXIT_USAGE


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, out of range, or at odds with another."""


class DataError(UserError):
    """Input, shards or tokenizer that cannot be used."""

    exit_code = EXIT_DATA


class CheckpointError(UserError):
    """A checkpoint or run folder that cannot be used."""

    exit_code = EXIT_STOP


class RunStopped(UserError):
    """Training that must not go on: restarting would meet the same end."""

    exit_code = EXIT_STOP


def leave_message(error: BaseException | str, code: int | None = None) -> None:
    """Let the launcher of this rank know why it ends: in the file that it named, and beside it the exit code where
    starting again would not help (`code`, else that of a UserError). What was said first stays: causes come before
    consequences."""
    file = os.environ.get(ERROR_FILE)
    if not file or Path(file).exists():
        return
    if isinstance(error, UserError):
        code = error.exit_code
    if code not in (None, EXIT_RETRY):
        Path(f"{file}.code").write_text(f"{code}\n")
    Path(file).write_text(error if isinstance(error, str) else _described(error))


def _described(error: BaseException) -> str:
    """What it says; for all but a UserError also where it came from, below its essence."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"
