"""`exlm evaluate`: a checkpoint by the masked tokens that it predicts, or many of them by the tasks of a suite."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from exlm_dist.cli.command import Commands, add_command, positive
from exlm_dist.suites.catalogue import SUITES
from exlm_dist.utils.errors import EXIT_SAVED, EXIT_STOP, ConfigError
from exlm_dist.utils.outputs import user_path
from exlm_dist.utils.signals import caught_signals

if TYPE_CHECKING:
    from exlm_dist.suites.evaluate_suite import SuiteRequest
    from exlm_dist.suites.masked_suite import MaskedRequest

#: The suite in which nothing is trained.
MASKED = "masked"
#: Options that the forms of the command have besides --data and --device.
_OF_RUN = {"split", "sequences", "mask_ratio", "complete"}
_OF_ALL_SUITES = {"checkpoint", "out", "tasks", "seeds", "jobs", "watch", "idle"}
_OF_SUITE = _OF_ALL_SUITES | {
    "splits",
    "protocol",
    "grid",
    "frozen",
    "frozen_only",
    "embed_once",
    "register",
    "chemprop",
}
_OF_MASKED = _OF_ALL_SUITES | {"split", "sequences", "complete", "ratios", "column"}


def register(commands: Commands) -> None:
    """Add `evaluate`."""
    names = ", ".join(SUITES)
    parser = add_command(
        commands,
        "evaluate",
        _evaluate,
        "a checkpoint by the masked tokens that it predicts, or checkpoints by the tasks of a suite",
    )
    parser.description = (
        "Three forms. `exlm evaluate RUN` masks held-out tokens and gives nll and accuracy per masked token. `exlm "
        "evaluate SUITE --checkpoint RUN ... --data FOLDER --out FOLDER` (suites: "
        f"{names}) fine-tunes each checkpoint on each task and makes one table of all. `exlm evaluate {MASKED} "
        "--checkpoint RUN ... --out FOLDER` asks them for the same masked tokens at many ratios. Both go on with what "
        "is missing when they are given again after a kill. A run folder that has the name of a suite is written "
        "./NAME."
    )
    parser.formatter_class = argparse.HelpFormatter
    parser.add_argument("what", metavar="RUN|SUITE", help=f"run or checkpoint folder, or a suite: {names}, {MASKED}")
    parser.add_argument(
        "--data",
        type=user_path,
        metavar="FOLDER",
        help="of a suite: its files as they are downloaded; of a run, and of masked tokens: prepared data (default: "
        "what it was trained on); of masked tokens also a file of rows",
    )
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda or cuda:1")
    _add_run(parser)
    _add_suite(parser)
    _add_masked(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(f"exlm evaluate RUN, and {MASKED}")
    group.add_argument("--split", choices=["valid", "train"], help="of the prepared data (default: valid)")
    group.add_argument("--sequences", type=int, help=f"first sequences used (default: all; of {MASKED} 500)")
    group.add_argument(
        "--mask-ratio", type=float, help="of a run: fraction of masked tokens (default: masking.eval_ratio of the run)"
    )
    group.add_argument(
        "--complete",
        type=int,
        metavar="N",
        help="first sequences of which the most probable completion is searched, for `exact` (default: 1000; of "
        f"{MASKED} 100)",
    )


def _add_suite(parser: argparse.ArgumentParser) -> None:
    splits = sorted({split for suite in SUITES.values() for split in suite.splits})
    protocols = sorted({protocol for suite in SUITES.values() for protocol in suite.protocols})
    baselines = ", ".join(f"`{one.name}` of {suite.name}" for suite in SUITES.values() for one in suite.baselines)
    group = parser.add_argument_group(f"exlm evaluate SUITE (*: {MASKED} too)")
    group.add_argument(
        "--checkpoint",
        nargs="+",
        metavar="WHAT",
        help="* run folders (their newest checkpoint) and checkpoints; not of masked also `random`, initial weights of "
        f"the same shapes, and baselines of the suite ({baselines})",
    )
    group.add_argument("--out", type=user_path, metavar="FOLDER", help="* folder of the results and the report")
    group.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"* default: all whose file is in the folder of data; of {MASKED} `ratios`, also `repeated`",
    )
    group.add_argument("--splits", nargs="+", choices=splits, metavar="SPLIT", help=f"of {', '.join(splits)}")
    group.add_argument("--protocol", choices=protocols, help="settings of the trainings (default: the suite's first)")
    group.add_argument(
        "--grid",
        nargs="+",
        metavar="NAME=V[,V]",
        help="settings that replace those of the protocol; of several values the best on the validation part is shown",
    )
    group.add_argument(
        "--seeds", type=positive, help="* trainings of each cell of the table (default: 3); of the masks (default: 1)"
    )
    _add_how(group)


def _add_how(group: argparse._ArgumentGroup) -> None:
    """What is trained of a checkpoint, by which processes, and what follows."""
    group.add_argument("--frozen", action="store_true", help="each checkpoint also with its head alone trained")
    group.add_argument(
        "--frozen-only",
        action="store_true",
        help="each checkpoint with its head alone trained, and not as a whole",
    )
    group.add_argument(
        "--embed-once",
        action="store_true",
        help="no training of checkpoints: each molecule embedded once, and linear probes on the embeddings; minutes",
    )
    group.add_argument(
        "--chemprop",
        type=user_path,
        metavar="FILE",
        help="the program of `chemprop`, which is installed in an environment of its own (default: on the PATH)",
    )
    group.add_argument(
        "--watch",
        type=user_path,
        metavar="RUN",
        help="* each checkpoint of this run as its training saves it, until that has ended",
    )
    group.add_argument(
        "--idle",
        type=positive,
        metavar="MINUTES",
        help="* with --watch: a training that has logged nothing for so long has ended, too (default: 60)",
    )
    group.add_argument(
        "--register",
        metavar="NAME",
        help="make the checkpoint with the best mean rank on the validation parts a version of this registered model "
        "in MLflow, with the alias champion",
    )
    group.add_argument(
        "--jobs", type=positive, help="* cells at a time (default: one for each GPU, else for each core)"
    )


def _add_masked(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(f"exlm evaluate {MASKED}")
    group.add_argument(
        "--ratios", nargs="+", type=float, metavar="R", help="fractions of masked tokens (default: 8 from 0.05 to 0.6)"
    )
    group.add_argument("--column", metavar="NAME", help="of a file given with --data: the column to read")


def _evaluate(options: argparse.Namespace) -> int:
    forms = {**dict.fromkeys(SUITES, (_OF_SUITE, _evaluate_suite)), MASKED: (_OF_MASKED, _evaluate_masked)}
    own, run = forms.get(options.what, (_OF_RUN, _evaluate_run))
    others = sorted((_OF_RUN | _OF_SUITE | _OF_MASKED) - own)
    if wrong := [name for name in others if getattr(options, name) not in (None, False)]:
        flag = f"--{wrong[0].replace('_', '-')}"
        suite = f"the suite {options.what}"
        what = suite if options.what in forms else f"a run, and {options.what} is no suite ({', '.join(forms)})"
        raise ConfigError(f"{flag} is no option of {what}: see exlm evaluate --help.")
    return run(options)


def _evaluate_run(options: argparse.Namespace) -> int:
    from exlm_dist.evaluation.masked_lm import evaluate_checkpoint

    print(
        evaluate_checkpoint(
            user_path(options.what),
            data=options.data,
            split=options.split or "valid",
            sequences=options.sequences,
            mask_ratio=options.mask_ratio,
            complete=1000 if options.complete is None else options.complete,
            device=options.device,
        )
    )
    return 0


def _evaluate_suite(options: argparse.Namespace) -> int:
    from exlm_dist.suites.evaluate_suite import SuiteRequest

    _check_given(options, "data", "out")
    if sum((options.frozen, options.frozen_only, options.embed_once)) > 1:
        raise ConfigError("--frozen, --frozen-only and --embed-once say what is trained: give one of them.")
    request = SuiteRequest(
        options.what,
        options.checkpoint or (),
        options.data,
        options.out,
        tasks=options.tasks or (),
        splits=options.splits or (),
        protocol=options.protocol,
        grid=options.grid or (),
        seeds=options.seeds or 3,
        frozen=options.frozen,
        frozen_only=options.frozen_only,
        embed_once=options.embed_once,
        jobs=options.jobs,
        device=options.device,
        chemprop=options.chemprop,
    )
    return _run(options, request)


def _evaluate_masked(options: argparse.Namespace) -> int:
    from exlm_dist.suites.masked_suite import DEFAULT_RATIOS, RATIOS, MaskedRequest

    _check_given(options, "out")
    request = MaskedRequest(
        options.checkpoint or (),
        options.out,
        watched=options.watch,
        data=options.data,
        split=options.split,
        column=options.column,
        tasks=options.tasks or (RATIOS,),
        ratios=options.ratios or DEFAULT_RATIOS,
        sequences=500 if options.sequences is None else options.sequences,
        complete=100 if options.complete is None else options.complete,
        seeds=options.seeds or 1,
        jobs=options.jobs,
        device=options.device,
    )
    return _run(options, request)


def _check_given(options: argparse.Namespace, *needed: str) -> None:
    """ConfigError for options that a suite needs."""
    for name in needed:
        if getattr(options, name) is None:
            raise ConfigError(f"exlm evaluate {options.what} needs --{name}.")
    if not options.checkpoint and not options.watch:
        raise ConfigError(f"exlm evaluate {options.what} needs --checkpoint, or --watch.")
    if options.idle and not options.watch:
        raise ConfigError("--idle is of a training that is watched: give --watch RUN.")


def _run(options: argparse.Namespace, request: SuiteRequest | MaskedRequest) -> int:
    """Evaluate, write the report, and record the results with their runs."""
    from exlm_dist.suites.watch import evaluate, watch_run

    try:
        with _interrupted_by_signals():
            if options.watch:
                idle = 60.0 * (options.idle or 60)
                summary = watch_run(request, options.watch, idle=idle, after_each=lambda: _record(options.out))
                if options.register:
                    _record(options.out, options.register)
            else:
                summary = evaluate(request)
                _record(options.out, options.register)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is missing", file=sys.stderr)
        return EXIT_SAVED
    print(summary)
    return EXIT_STOP if summary.failed else 0


def _record(out: Path, register: str | None = None) -> None:
    """Report and MLflow of all that is in the folder."""
    from exlm_dist.analysis.suite_report import suite_report
    from exlm_dist.suites.suite_tracking import record_results

    print(f"report: {suite_report(out)}", flush=True)
    record_results(out, register)


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Have the signals by which jobs are ended do what Ctrl-C does."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in caught_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
