"""What a checkpoint is asked: `exlm embed`."""

from __future__ import annotations

import argparse
from pathlib import Path

from exlm_dist.cli.command import Commands, add_command, add_input_options, input_options, positive


def register(commands: Commands) -> None:
    """Add `embed`."""
    embed = add_command(commands, "embed", _embed, "one vector for each text or molecule of a file")
    embed.add_argument("inputs", nargs="+", metavar="FILE", help="csv, tsv, smi, txt, jsonl or parquet; patterns too")
    embed.add_argument(
        "--checkpoint", type=Path, required=True, help="run folder (its newest checkpoint) or checkpoint folder"
    )
    embed.add_argument(
        "--out", type=Path, required=True, metavar="TABLE", help=".parquet, .npz, .csv, .tsv or .jsonl file to write"
    )
    add_input_options(embed)
    embed.add_argument(
        "--pooling", default="mean", help="mean over the tokens, first (the vector of <s>), or max of each dimension"
    )
    embed.add_argument("--layer", type=int, help="0: token embeddings, i: block i; default: the last, normalised")
    embed.add_argument("--truncate", action="store_true", help="cut texts that are too long, instead of failing them")
    embed.add_argument("--overwrite", action="store_true", help="replace the table if it exists")
    embed.add_argument("--device", default="auto", help="auto, cpu or cuda")
    embed.add_argument("--workers", type=positive, help="processes that encode; default: the cores of this machine")


def _embed(options: argparse.Namespace) -> int:
    from exlm_dist.inference.embed_file import embed_file
    from exlm_dist.inference.loading import load_checkpoint

    print(
        embed_file(
            load_checkpoint(options.checkpoint, device=options.device),
            options.inputs,
            options.out,
            options=input_options(options),
            pooling=options.pooling,
            layer=options.layer,
            truncate=options.truncate,
            overwrite=options.overwrite,
            workers=options.workers,
        )
    )
    return 0
