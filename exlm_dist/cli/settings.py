"""`exlm config`: the settings of a run shown, checked and explained."""

from __future__ import annotations

import argparse
from pathlib import Path

from exlm_dist.cli.command import Commands, add_command, add_group


def register(commands: Commands) -> None:
    """Add `config` and its actions."""
    actions = add_group(commands, "config", "show, explain or check settings", metavar="ACTION")
    show = add_command(actions, "show", _show, "print the resolved configuration", overrides=True)
    check = add_command(
        actions, "check", _check, "validate, and print parameters, FLOPs, expanded length and memory", overrides=True
    )
    job = add_command(actions, "job", _job, "for job files: the run folder, and launch.restarts", overrides=True)
    for parser in (show, check, job):
        parser.add_argument("config", help="YAML file")
    job.add_argument("--allow-changes", action="store_true", help=argparse.SUPPRESS)  # of the job's `exlm pretrain`
    check.add_argument("--world", type=int, help="number of ranks; default: those that the layout needs")
    check.add_argument("--length", type=int, help="sequence length; default: that of the prepared data, else 128")
    check.add_argument("--vocab-size", type=int, help="vocabulary; default: that of the prepared data, else 32000")
    schema = add_command(actions, "schema", _schema, "every setting with type, default and meaning")
    schema.add_argument("section", nargs="?", default="", help="section or setting, say model or optimizer.lr")
    schema.add_argument("--markdown", action="store_true", help="the whole reference as Markdown")


def _show(options: argparse.Namespace) -> int:
    from exlm_dist.config import dump_config, load_config

    print(dump_config(load_config(options.config, options.overrides)), end="")
    return 0


def _check(options: argparse.Namespace) -> int:
    from exlm_dist.config import check_init, load_config
    from exlm_dist.planning.report import describe

    config = load_config(options.config, options.overrides)
    check_init(config)
    world = options.world or config.local_processes
    print(describe(config, world=world, length=options.length, vocab_size=options.vocab_size))
    return 0


def _job(options: argparse.Namespace) -> int:
    from exlm_dist.config import load_config

    config = load_config(options.config, options.overrides)
    print(Path(config.runs) / config.name, config.launch.restarts, sep="\n")
    return 0


def _schema(options: argparse.Namespace) -> int:
    from exlm_dist.config import reference

    print(reference.markdown() if options.markdown else reference.text(options.section))
    return 0
