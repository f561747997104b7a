"""Checkpoints made of others and of files of other libraries: `exlm average` and `import`."""

from __future__ import annotations

import argparse

from exlm_dist.cli.command import Commands, add_command, add_group
from exlm_dist.utils.outputs import user_path


def register(commands: Commands) -> None:
    """Add `average` and `import`."""
    average = add_command(commands, "average", _average, "mean of checkpoints of one run, as a checkpoint")
    average.add_argument(
        "checkpoints",
        nargs="+",
        type=user_path,
        metavar="CHECKPOINT",
        help="checkpoint folders, or run folders (the newest)",
    )
    average.add_argument("--out", type=user_path, required=True, metavar="FOLDER", help="checkpoint folder to write")
    average.add_argument(
        "--weights", nargs="+", type=float, metavar="WEIGHT", help="of the checkpoints, in their order; default: equal"
    )
    formats = add_group(commands, "import", "make a checkpoint of other libraries' weights", metavar="FORMAT")
    fairseq = add_command(formats, "fairseq", _import_fairseq, "weights in the layout of the authors' fairseq code")
    fairseq.add_argument("file", type=user_path, metavar="FILE", help="safetensors file")
    fairseq.add_argument("--out", type=user_path, required=True, metavar="FOLDER", help="checkpoint folder to write")
    fairseq.add_argument(
        "--tokenizer",
        type=user_path,
        required=True,
        metavar="PATH",
        help="folder with the tokenizer (prepared data, a checkpoint), or a sentencepiece model file",
    )
    fairseq.add_argument(
        "--config", type=user_path, metavar="YAML", help="file with the model section; not for what `exlm export` wrote"
    )
    fairseq.add_argument(
        "--dictionary",
        type=user_path,
        metavar="FILE",
        help="fairseq's dict.txt, if its order is not that of the tokenizer",
    )


def _average(options: argparse.Namespace) -> int:
    from exlm_dist.checkpoint.average import average_checkpoints

    print(average_checkpoints(options.checkpoints, options.out, options.weights))
    return 0


def _import_fairseq(options: argparse.Namespace) -> int:
    from exlm_dist.export.import_fairseq import import_fairseq

    print(
        import_fairseq(
            options.file,
            options.out,
            tokenizer=options.tokenizer,
            config=options.config,
            dictionary=options.dictionary,
        )
    )
    return 0
