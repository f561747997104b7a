"""Errors meant for the user: each says what is wrong, where, and how to mend it.

The exit codes are a contract with the launchers: 0 done, 2 bad configuration or arguments, 75 saved and wants to be
requeued, 76 retry in place, 77 data fault, 78 stop (restarting would not help).
"""

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_SAVED = 75
EXIT_RETRY = 76
EXIT_DATA = 77
EXIT_STOP = 78


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
