"""How a command is added to the command line: its parser, its handler, and the overrides that it may take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

from exlm_dist.tables.input_files import FORMATS, InputOptions

#: What `register` of each group adds its commands to.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
#: Runs a command with its parsed options and returns the exit code.
Handler: TypeAlias = Callable[[argparse.Namespace], int]

_OVERRIDES = (
    "Settings of the file are overridden by --section.key VALUE, say --model.layers 6 (see `exlm config schema`)."
)


def add_command(
    commands: Commands, name: str, handler: Handler, summary: str, *, overrides: bool = False
) -> argparse.ArgumentParser:
    """Add the command `name`; the caller adds its arguments to the parser returned.

    `overrides`: what the parser does not know is a setting; the handler finds it in `options.overrides`, for
    `load_config`. For all other commands it is an error.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=_OVERRIDES if overrides else "",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(handler=handler, overrides=[] if overrides else None)
    return parser


def add_group(commands: Commands, name: str, summary: str, *, metavar: str, description: str = "") -> Commands:
    """Add `exlm NAME METAVAR ...`, whose own commands are added to what is returned."""
    described = description or f"{summary[0].upper()}{summary[1:]}."
    parser = commands.add_parser(name, help=summary, description=described)
    return parser.add_subparsers(required=True, metavar=metavar)


def add_input_options(parser: argparse.ArgumentParser, *, pairs: bool = False) -> None:
    """Add what a user may say of input files; `input_options` reads it. `pairs`: --column takes a list of columns."""
    parser.add_argument(
        "--column",
        metavar="NAME",
        nargs="+" if pairs else None,
        default=[] if pairs else None,
        help="column or field to read: its name, or its number from 1 where none has that name"
        + ("; of pairs of texts both" if pairs else ""),
    )
    parser.add_argument("--format", choices=FORMATS, help="what all input files are, whatever their names say")
    parser.add_argument(
        "--delimiter", metavar="CHARACTER", help="character between the columns of csv or tsv, such as ';', or tab"
    )
    parser.add_argument(
        "--no-header",
        dest="header",
        action="store_const",
        const=False,
        help="the first row of csv and tsv is data; their columns have numbers from 1",
    )


def input_options(options: argparse.Namespace) -> InputOptions:
    """What the options of `add_input_options` say, of a list of columns the first. ConfigError if they contradict one
    another."""
    column = options.column if isinstance(options.column, str) else next(iter(options.column or ()), None)
    return InputOptions(column, options.format, options.delimiter, options.header)


def add_random_smiles(parser: argparse.ArgumentParser) -> None:
    """--random-smiles and --random-seed."""
    parser.add_argument(
        "--random-smiles",
        type=positive,
        metavar="K",
        default=0,
        help="as an augmentation, K random SMILES of each training molecule beside the canonical one; an epoch "
        "reads one of these K + 1",
    )
    parser.add_argument("--random-seed", type=int, metavar="SEED", default=0, help="decides which random SMILES")


def positive(text: str) -> int:
    """Type of an argument that is a whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
