"""The `exlm` command: parse the command line, run one command, turn its errors into exit codes.

Each module of `GROUPS` registers a few commands. A new command is one more in the group that it belongs to, or in a new
module with a `register` of its own; everything heavy is imported inside the handler that needs it.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import traceback
from collections.abc import Sequence

from exlm_dist import __version__
from exlm_dist.cli import conversions, data, evaluate, finetune, inference, prepare, results, settings, train
from exlm_dist.utils.errors import EXIT_USAGE, UserError, leave_message
from exlm_dist.utils.logs import configure_logging
from exlm_dist.utils.search_path import shield_children
from exlm_dist.utils.signals import exit_by_signals

#: In the order of `exlm --help`.
GROUPS = (prepare, data, train, inference, finetune, evaluate, results, conversions, settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; user errors are printed without a traceback."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.overrides is None:
        parser.error(f"unknown argument {rest[0]!r} (see `exlm {options.command} --help`)")
    options.overrides = rest
    configure_logging()
    try:
        return options.handler(options)
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except ImportError as error:
        traceback.print_exc()
        return _fail(
            f"{sys.executable} on {platform.node()} cannot import what exlm needs: {error}. Install it there "
            "(launchers/install.sh), or choose another Python (a job file: EXLM_PYTHON or EXLM_VENV).",
            EXIT_USAGE,
        )
    except MemoryError:
        traceback.print_exc()
        return _fail(
            "the memory that this process may use is not enough (`ulimit -v` shows a limit). Raise it, or use fewer "
            "--workers or smaller micro-batches.",
            EXIT_USAGE,
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def entry() -> None:
    """Console entry: `exlm`, and what the launchers start with `-m exlm_dist.cli`.

    A rank of a job exits without the interpreter's clean-up: the threads of a process group that was left early
    sometimes make it abort, which would hide the exit code. Everything that must be closed is closed by then.
    """
    shield_children()
    if "RANK" not in os.environ:
        exit_by_signals()
        try:
            sys.exit(main())
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
    try:
        code: int | str | None = main()
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        traceback.print_exc()
        leave_message(error)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if (heartbeat := sys.modules.get("exlm_dist.launch.heartbeat")) is not None:  # training has begun
        heartbeat.stop()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. Imports nothing heavy: `exlm --help` answers at once."""
    parser = argparse.ArgumentParser(
        prog="exlm", description="Pretrain ExLM and plain masked language models for text and molecules."
    )
    parser.add_argument("--version", action="version", version=f"exlm_dist {__version__}")
    # What torch.distributed.launch puts before the command; the environment says the same.
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.register(commands)
    return parser


def _fail(message: str, code: int) -> int:
    """Print why the command failed, and tell the launcher if this is a rank; returns `code`."""
    rank = os.environ.get("RANK")
    print(f"{f'[rank {rank}] ' if rank else ''}error: {message}", file=sys.stderr, flush=True)
    leave_message(message, code)
    return code
