"""`exlm finetune` and `exlm predict`: a checkpoint trained to predict columns of a table, and its predictions."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from exlm_dist.cli.command import Commands, add_command, add_input_options, input_options, positive
from exlm_dist.finetuning.finetune_settings import (
    CLASS_WEIGHTS,
    KEEP,
    METRICS,
    POOLINGS,
    SPLITS,
    TASKS,
    SplitSettings,
    TrainingSettings,
)
from exlm_dist.utils.errors import EXIT_SAVED, ConfigError
from exlm_dist.utils.outputs import user_path

_DEVICE = "auto, cpu, cuda or cuda:1"
_DATA = "files or patterns: .csv .tsv .jsonl .parquet, plain or compressed"


def register(commands: Commands) -> None:
    """Add `finetune` and `predict`."""
    finetune = add_command(commands, "finetune", _finetune, "train a checkpoint to predict columns of a table")
    finetune.add_argument("data", nargs="+", metavar="DATA", help=_DATA)
    finetune.add_argument("--target", nargs="+", required=True, metavar="COLUMN", help="columns to predict")
    finetune.add_argument(
        "--checkpoint", type=user_path, required=True, help="run folder (its newest checkpoint) or checkpoint folder"
    )
    finetune.add_argument("--out", type=user_path, required=True, metavar="MODEL", help="folder of the model to write")
    add_input_options(finetune, pairs=True)
    finetune.add_argument("--task", choices=TASKS, help="default: what the values of the targets show")
    finetune.add_argument(
        "--truncate", action="store_true", help="cut texts that are too long; by default they are not used"
    )
    finetune.add_argument("--device", default="auto", help=_DEVICE)
    finetune.add_argument(
        "--no-mlflow",
        dest="mlflow",
        action="store_false",
        help="send nothing to MLflow; later: `exlm sync MODEL`",
    )
    _add_split(finetune)
    _add_training(finetune)
    predict = add_command(commands, "predict", _predict, "predictions of a fine-tuned model for the rows of a table")
    predict.add_argument("model", type=user_path, metavar="MODEL", help="folder that `exlm finetune` wrote")
    predict.add_argument("data", nargs="+", metavar="DATA", help=_DATA)
    predict.add_argument(
        "--out", type=user_path, required=True, metavar="TABLE", help="table to write: .csv .tsv .jsonl .parquet .npz"
    )
    add_input_options(predict, pairs=True)
    predict.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    predict.add_argument("--device", default="auto", help=_DEVICE)


def _add_split(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("split")
    default = SplitSettings()
    group.add_argument(
        "--split",
        nargs="+",
        metavar="KIND",
        help=f"{', '.join(SPLITS[:2])}, or `column NAME`, which says train, valid or test in each row; default: "
        "scaffold for molecules, random for text",
    )
    group.add_argument(
        "--split-sizes", nargs=3, type=float, default=default.sizes, metavar="F", help="fractions of the three parts"
    )
    group.add_argument("--split-seed", type=int, default=default.seed, help="of the random split")
    group.add_argument(
        "--scaffold-chirality",
        action=argparse.BooleanOptionalAction,
        default=default.chirality,
        help="whether scaffolds that differ in their stereo centres are different ones",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    default = TrainingSettings()
    group.add_argument("--seeds", type=positive, default=default.seeds, help="members of the ensemble")
    group.add_argument("--seed", type=int, default=default.seed, help="of the first member; the others count on")
    group.add_argument("--epochs", type=positive, default=default.epochs, help="at most")
    group.add_argument("--batch", type=positive, default=default.batch, help="rows of an optimizer step")
    group.add_argument("--lr", type=float, default=default.lr, help="highest learning rate")
    group.add_argument(
        "--patience", type=int, default=default.patience, help="epochs without a better metric; 0: never end early"
    )
    group.add_argument(
        "--metric",
        choices=sorted({*METRICS["classification"], *METRICS["regression"]}),
        help="of the validation part, decides which epoch is the best; default: roc_auc or rmse",
    )
    group.add_argument("--keep", choices=KEEP, default=default.keep, help="the weights of the best or the last epoch")
    group.add_argument("--pooling", choices=POOLINGS, default=default.pooling, help="of the tokens' hidden states")
    group.add_argument("--dropout", type=float, default=default.dropout, help="in the head")
    group.add_argument("--weight-decay", type=float, default=default.weight_decay, help="of matrices")
    group.add_argument("--warmup", type=float, default=default.warmup, help="fraction of the steps")
    group.add_argument("--clip", type=float, default=default.clip, help="largest norm of the gradient; 0: any")
    group.add_argument(
        "--class-weights",
        choices=CLASS_WEIGHTS,
        default=default.class_weights,
        help="balanced: rare classes count more",
    )
    group.add_argument(
        "--scale-targets",
        action=argparse.BooleanOptionalAction,
        default=default.scale_targets,
        help="regression learns values with mean 0 and standard deviation 1",
    )
    group.add_argument("--frozen", action="store_true", help="train the head alone")
    group.add_argument(
        "--layer-decay",
        type=float,
        default=default.layer_decay,
        help="factor of the rate from a layer to the one below",
    )


def _finetune(options: argparse.Namespace) -> int:
    from exlm_dist.analysis.finetuning_report import PAGE, finetuning_report
    from exlm_dist.finetuning.ensemble import finetune
    from exlm_dist.finetuning.finetuning_tracking import record_finetuning

    settings = TrainingSettings(**{one.name: getattr(options, one.name) for one in fields(TrainingSettings)})
    try:
        finetune(
            options.data,
            options.target,
            options.checkpoint,
            options.out,
            inputs=options.column,
            options=input_options(options),
            task=options.task,
            training=settings,
            split=_split(options),
            truncate=options.truncate,
            device=options.device,
        )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last whole epoch", file=sys.stderr)
        return EXIT_SAVED
    finetuning_report(options.out)
    print(f"report: {options.out / PAGE}", flush=True)
    record_finetuning(options.out, send=options.mlflow)
    return 0


def _predict(options: argparse.Namespace) -> int:
    from exlm_dist.finetuning.predict_table import predict_table

    print(
        predict_table(
            options.model,
            options.data,
            options.out,
            inputs=options.column,
            options=input_options(options),
            overwrite=options.overwrite,
            device=options.device,
        )
    )
    return 0


def _split(options: argparse.Namespace) -> SplitSettings:
    kind, *rest = options.split or [None]
    if len(rest) != (1 if kind == "column" else 0):
        raise ConfigError("--split must be scaffold, random, or column NAME.")
    return SplitSettings(
        kind, rest[0] if rest else None, tuple(options.split_sizes), options.split_seed, options.scaffold_chirality
    )
