"""What is done with a trained run: `exlm report`, `sync` and `export`."""

from __future__ import annotations

import argparse

from exlm_dist.cli.command import Commands, add_command, add_group
from exlm_dist.utils.errors import EXIT_RETRY
from exlm_dist.utils.outputs import user_path

_CHECKPOINT = "run folder (its newest checkpoint) or checkpoint folder"


def register(commands: Commands) -> None:
    """Add `report`, `sync` and `export`."""
    report = add_command(
        commands, "report", _report, "plots, and a table that compares runs at equal steps and equal seconds"
    )
    report.add_argument(
        "runs", nargs="+", type=user_path, help="run folders; fine-tuned models and evaluations, each by itself"
    )
    sync = add_command(commands, "sync", _sync, "send what the tracking server has not received yet")
    sync.add_argument("runs", nargs="+", type=user_path, help="run folders, or fine-tuned models")
    sync.add_argument("--timeout", type=float, default=60.0, help="seconds to try")
    formats = add_group(commands, "export", "write a checkpoint for other libraries", metavar="FORMAT")
    hf = add_command(formats, "hf", _export_hf, "folder that the transformers library loads")
    hf.add_argument("checkpoint", type=user_path, help=_CHECKPOINT)
    hf.add_argument("--out", type=user_path, required=True, metavar="FOLDER", help="folder to write")
    hf.add_argument("--overwrite", action="store_true", help="replace an ExLM model for transformers in --out")
    fairseq = add_command(formats, "fairseq", _export_fairseq, "weights in the layout of the authors' fairseq code")
    fairseq.add_argument("checkpoint", type=user_path, help=_CHECKPOINT)
    fairseq.add_argument("--out", type=user_path, required=True, metavar="FILE", help="safetensors file to write")


def _report(options: argparse.Namespace) -> int:
    from exlm_dist.analysis.finetuning_report import PAGE, finetuning_report
    from exlm_dist.analysis.run_report import run_report
    from exlm_dist.analysis.suite_report import suite_report
    from exlm_dist.finetuning.model_folder import is_model_folder
    from exlm_dist.suites.out_folder import is_suite_folder

    models = [folder for folder in options.runs if is_model_folder(folder)]
    for model in models:
        finetuning_report(model)
        print(model / PAGE)
    evaluations = [folder for folder in options.runs if is_suite_folder(folder)]
    for evaluation in evaluations:
        print(suite_report(evaluation))
    if runs := [folder for folder in options.runs if folder not in (*models, *evaluations)]:
        print(run_report(runs))
    return 0


def _sync(options: argparse.Namespace) -> int:
    from exlm_dist.tracking import sync

    complete = [sync(run, timeout=options.timeout) for run in options.runs]
    return 0 if all(complete) else EXIT_RETRY


def _export_hf(options: argparse.Namespace) -> int:
    from exlm_dist.export.hf.hf_folder import export_hf

    print(export_hf(options.checkpoint, options.out, overwrite=options.overwrite))
    return 0


def _export_fairseq(options: argparse.Namespace) -> int:
    from exlm_dist.export.fairseq import export_fairseq

    print(export_fairseq(options.checkpoint, options.out))
    return 0
