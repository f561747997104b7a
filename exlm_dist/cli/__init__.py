"""The `exlm` command. Everything heavy is imported only by the command that needs it."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from exlm_dist import __version__
from exlm_dist.launch.arguments import add_launch
from exlm_dist.utils.errors import EXIT_RETRY, EXIT_USAGE, UserError, leave_message
from exlm_dist.utils.logs import configure_logging

Command = Callable[[argparse.Namespace, list[str]], int]

OVERRIDES = (
    "Settings of the file are overridden by --section.key VALUE, say --model.layers 6 (see `exlm config schema`)."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors of the user are printed without a traceback."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.takes_overrides:
        parser.error(f"unknown argument {rest[0]!r} (see `exlm {options.command} --help`)")
    configure_logging()
    try:
        return options.run(options, rest)
    except UserError as error:
        return _refuse(str(error), error.exit_code)
    except ImportError as error:
        traceback.print_exc()
        return _refuse(
            f"{sys.executable} on {platform.node()} cannot import what exlm needs: {error}. Install it there "
            "(launchers/install.sh), or have another Python take its place (a job file: EXLM_PYTHON or EXLM_VENV).",
            EXIT_USAGE,
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _refuse(message: str, code: int) -> int:
    """Say why the command ends, to the launcher too where this is a rank; its exit code."""
    rank = os.environ.get("RANK")
    print(f"{f'[rank {rank}] ' if rank else ''}error: {message}", file=sys.stderr, flush=True)
    leave_message(message, code)
    return code


def entry() -> None:
    """Console entry: `exlm`, and what the launchers start with `-m exlm_dist.cli`.

    A rank of a job ends without the interpreter's clean-up: threads of a process group that was left early make it
    abort now and then, which would hide the exit code. Everything that must be closed was closed by then.
    """
    if "RANK" not in os.environ:
        sys.exit(main())
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
    if (heartbeat := sys.modules.get("exlm_dist.launch.heartbeat")) is not None:  # where a training has begun
        heartbeat.stop()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="exlm", description="Pretrain ExLM and plain masked language models for text and molecules."
    )
    parser.add_argument("--version", action="version", version=f"exlm_dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_prepare(commands)
    _add_pretrain(commands)
    _add_plan(commands)
    add_launch(commands, _command, OVERRIDES)
    _add_doctor(commands)
    _add_after_training(commands)
    _add_config(commands)
    return parser


def _command(
    commands, name: str, run: Command, summary: str, *, overrides: bool = False, epilog: str = ""
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run, takes_overrides=overrides)
    return parser


def _add_prepare(commands) -> None:
    prepare = commands.add_parser(
        "prepare",
        help="turn SMILES or text into tokenized shards",
        description="Turn SMILES or text into tokenized shards.",
    )
    kinds = prepare.add_subparsers(dest="kind", required=True, metavar="KIND")
    smiles = _command(
        kinds, "smiles", _prepare_smiles, "molecules as SMILES: .smi .txt .csv .tsv .jsonl .parquet, plain, .gz or .zst"
    )
    text = _command(
        kinds,
        "text",
        _prepare_text,
        "text: .txt (documents divided by blank lines) .csv .tsv .jsonl .parquet, plain, .gz or .zst",
    )
    for parser in (smiles, text):
        parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="input files or glob patterns")
        parser.add_argument(
            "--column", help="column (csv, tsv, parquet) or field (jsonl) that holds the SMILES or the text"
        )
        parser.add_argument(
            "--valid-input",
            dest="valid_inputs",
            nargs="+",
            default=[],
            metavar="FILE",
            help="held-out files; without them a share of --input is held out",
        )
        parser.add_argument("--valid-fraction", type=float, default=0.02, help="share of the records held out")
        parser.add_argument(
            "--tokenizer",
            metavar="FOLDER",
            help="use this tokenizer folder (of an earlier prepare, or of a checkpoint)",
        )
    smiles.add_argument(
        "--stereo",
        choices=["keep", "drop"],
        help="stereo marks in the canonical SMILES (keep, or what --tokenizer says)",
    )
    smiles.add_argument(
        "--salts",
        choices=["keep", "largest_fragment"],
        help="what becomes of molecules of several parts (keep, or what --tokenizer says)",
    )
    text.add_argument("--vocab-size", type=int, default=32000, help="sentencepiece vocabulary")
    demo_smiles = _command(kinds, "demo-smiles", _prepare_demo_smiles, "the embedded demonstration corpus of molecules")
    demo_smiles.add_argument("--molecules", type=int, default=24000, help="distinct molecules to build")
    demo_text = _command(kinds, "demo-text", _prepare_demo_text, "the embedded demonstration corpus of English prose")
    demo_text.add_argument("--vocab-size", type=int, default=2000, help="sentencepiece vocabulary")
    for parser in (smiles, text, demo_smiles, demo_text):
        parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to publish")
        parser.add_argument("--max-length", type=int, default=128, help="longest sequence, BOS and EOS counted")
        parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
        parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")


def _add_pretrain(commands) -> None:
    pretrain = _command(
        commands,
        "pretrain",
        _pretrain,
        "train, or continue, the run that a configuration describes",
        overrides=True,
        epilog=OVERRIDES,
    )
    pretrain.add_argument("config", help="YAML file, say configs/pretrain/demo_smiles_exlm.yaml")
    pretrain.add_argument("--local_rank", help=argparse.SUPPRESS)


def _add_plan(commands) -> None:
    from exlm_dist.planning import command

    about = "layouts that fit on so many GPUs, with memory, traffic and predicted time, and the one to take"
    command.add_options(_command(commands, "plan", command.run, about, overrides=True, epilog=OVERRIDES))


def _add_doctor(commands) -> None:
    doctor = _command(
        commands,
        "doctor",
        _doctor,
        "look for what would waste GPU hours before they are spent; exit code 1 where a check fails",
        overrides=True,
        epilog=OVERRIDES,
    )
    doctor.add_argument(
        "config", nargs="?", help="YAML file of the run to be; without it only the machine is looked at"
    )
    doctor.add_argument(
        "--nodes", action="store_true", help="ranks on all nodes of this Slurm job, not launch.processes here"
    )


def _add_after_training(commands) -> None:
    evaluate = _command(
        commands, "evaluate", _evaluate, "nll and accuracy per masked token of a checkpoint on held-out data"
    )
    evaluate.add_argument("checkpoint", type=Path, help="run folder (its newest checkpoint) or checkpoint folder")
    evaluate.add_argument("--data", type=Path, help="prepared folder; default: the one the run was trained on")
    evaluate.add_argument("--split", choices=["valid", "train"], default="valid", help="split of the data")
    evaluate.add_argument("--sequences", type=int, help="first sequences used; default: all")
    evaluate.add_argument(
        "--mask-ratio", type=float, help="share of masked tokens; default: masking.eval_ratio of the run"
    )
    report = _command(
        commands, "report", _report, "plots, and a table that compares runs at equal steps and equal seconds"
    )
    report.add_argument("runs", nargs="+", type=Path, help="run folders")
    sync = _command(commands, "sync", _sync, "send what the tracking server has not received yet")
    sync.add_argument("runs", nargs="+", type=Path, help="run folders")
    sync.add_argument("--timeout", type=float, default=60.0, help="seconds to try")
    export = _command(commands, "export", _export, "weights in the layout of the authors' fairseq code")
    export.add_argument("checkpoint", type=Path, help="run folder (its newest checkpoint) or checkpoint folder")
    export.add_argument("--out", type=Path, required=True, help="safetensors file to write")


def _add_config(commands) -> None:
    config = commands.add_parser(
        "config", help="show, explain or check settings", description="Show, explain or check settings."
    )
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = _command(actions, "show", _config_show, "print the resolved configuration", overrides=True, epilog=OVERRIDES)
    check = _command(
        actions,
        "check",
        _config_check,
        "validate, and print parameters, FLOPs, expanded length and memory",
        overrides=True,
        epilog=OVERRIDES,
    )
    job = _command(
        actions,
        "job",
        _config_job,
        "for job files: the run folder, and launch.restarts",
        overrides=True,
        epilog=OVERRIDES,
    )
    for parser in (show, check, job):
        parser.add_argument("config", help="YAML file")
    check.add_argument("--world", type=int, help="number of ranks; default: those that the layout needs")
    check.add_argument("--length", type=int, help="sequence length; default: that of the prepared data, else 128")
    check.add_argument("--vocab-size", type=int, help="vocabulary; default: that of the prepared data, else 32000")
    schema = _command(actions, "schema", _config_schema, "every setting with type, default and meaning")
    schema.add_argument("section", nargs="?", default="", help="section or setting, say model or optimizer.lr")
    schema.add_argument("--markdown", action="store_true", help="the whole reference as Markdown")


def _prepare_smiles(options: argparse.Namespace, _: list[str]) -> int:
    from exlm_dist.prepare.api import prepare_smiles

    print(prepare_smiles(**_settings(options, input="inputs")))
    return 0


def _prepare_text(options: argparse.Namespace, _: list[str]) -> int:
    from exlm_dist.prepare.api import prepare_text

    print(prepare_text(**_settings(options, input="inputs")))
    return 0


def _prepare_demo_smiles(options: argparse.Namespace, _: list[str]) -> int:
    from exlm_dist.prepare.demo.demo_molecules import prepare_demo_smiles

    print(prepare_demo_smiles(**_settings(options, molecules="count")))
    return 0


def _prepare_demo_text(options: argparse.Namespace, _: list[str]) -> int:
    from exlm_dist.prepare.demo.demo_text import prepare_demo_text

    print(prepare_demo_text(**_settings(options)))
    return 0


def _settings(options: argparse.Namespace, **renamed: str) -> dict[str, Any]:
    """What the command's own options say, by the names of the function they go to."""
    own = {"command", "kind", "run", "takes_overrides"}
    return {renamed.get(name, name): value for name, value in vars(options).items() if name not in own}


def _pretrain(options: argparse.Namespace, overrides: list[str]) -> int:
    from exlm_dist.config import load_config

    config = load_config(options.config, overrides)
    if "RANK" not in os.environ and (config.local_processes > 1 or config.launch.restarts):
        from exlm_dist.launch.local import run_local
        from exlm_dist.launch.restart import Restarts

        return run_local([options.config, *overrides], config.local_processes, Restarts.begin(config))
    from exlm_dist.training.loop import train

    return train(config)


def _doctor(options: argparse.Namespace, overrides: list[str]) -> int:
    from exlm_dist.doctor.examination import doctor

    return doctor(options.config, overrides, nodes=options.nodes)


def _evaluate(options: argparse.Namespace, _: list[str]) -> int:
    from exlm_dist.evaluation.masked_lm import evaluate_checkpoint

    print(
        evaluate_checkpoint(
            options.checkpoint,
            data=options.data,
            split=options.split,
            sequences=options.sequences,
            mask_ratio=options.mask_ratio,
        )
    )
    return 0


def _report(options: argparse.Namespace, _: list[str]) -> int:
    from exlm_dist.analysis.run_report import run_report

    print(run_report(options.runs))
    return 0


def _sync(options: argparse.Namespace, _: list[str]) -> int:
    from exlm_dist.tracking import sync

    complete = [sync(run, timeout=options.timeout) for run in options.runs]
    return 0 if all(complete) else EXIT_RETRY


def _export(options: argparse.Namespace, _: list[str]) -> int:
    from exlm_dist.export.fairseq import export_checkpoint

    print(export_checkpoint(options.checkpoint, options.out))
    return 0


def _config_show(options: argparse.Namespace, overrides: list[str]) -> int:
    from exlm_dist.config import dump_config, load_config

    print(dump_config(load_config(options.config, overrides)), end="")
    return 0


def _config_job(options: argparse.Namespace, overrides: list[str]) -> int:
    from exlm_dist.config import load_config

    config = load_config(options.config, overrides)
    print(Path(config.runs) / config.name, config.launch.restarts, sep="\n")
    return 0


def _config_check(options: argparse.Namespace, overrides: list[str]) -> int:
    from exlm_dist.config import load_config
    from exlm_dist.planning.report import describe

    config = load_config(options.config, overrides)
    world = options.world or config.local_processes
    print(describe(config, world=world, length=options.length, vocab_size=options.vocab_size))
    return 0


def _config_schema(options: argparse.Namespace, _: list[str]) -> int:
    from exlm_dist.config import reference

    print(reference.markdown() if options.markdown else reference.text(options.section))
    return 0
