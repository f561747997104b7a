"""What a checkpoint is asked: `exlm embed` and `fill`."""

from __future__ import annotations

import argparse

from exlm_dist.cli.command import Commands, add_command, add_input_options, input_options, positive
from exlm_dist.utils.errors import ConfigError
from exlm_dist.utils.outputs import user_path

_TABLE = ".parquet, .npz, .csv, .tsv or .jsonl file to write"


def register(commands: Commands) -> None:
    """Add `embed` and `fill`."""
    embed = add_command(commands, "embed", _embed, "one vector for each text or molecule of a file")
    embed.add_argument("inputs", nargs="+", metavar="FILE", help="csv, tsv, smi, txt, jsonl or parquet; patterns too")
    embed.add_argument("--out", type=user_path, required=True, metavar="TABLE", help=_TABLE)
    add_input_options(embed)
    embed.add_argument(
        "--pooling", default="mean", help="mean over the tokens, first (the vector of <s>), or max of each dimension"
    )
    embed.add_argument("--layer", type=int, help="0: token embeddings, i: block i; default: the last, normalised")
    embed.add_argument("--truncate", action="store_true", help="cut texts that are too long, instead of failing them")
    embed.add_argument("--workers", type=positive, help="processes that encode; default: the cores of this machine")
    fill = add_command(commands, "fill", _fill, "what stands at the masks of a text or molecule, all masks jointly")
    fill.add_argument("texts", nargs="*", metavar="TEXT", help="'CC(=O)<mask>c1ccccc1'; [MASK] too")
    fill.add_argument("--input", nargs="+", metavar="FILE", help="rows to fill instead: csv, tsv, smi, txt, ...")
    fill.add_argument("--out", type=user_path, metavar="TABLE", help=f"with --input: {_TABLE}")
    add_input_options(fill)
    fill.add_argument("--top", type=int, default=5, help="completions of each text")
    fill.add_argument("--beam", type=int, default=64, help="prefixes that the search keeps")
    fill.add_argument("--sample", type=int, default=0, metavar="N", help="N random completions, not the most probable")
    fill.add_argument("--temperature", type=float, default=1.0, help="of the samples: below 1 nearer to the best")
    fill.add_argument("--seed", type=int, default=0, help="of the samples")
    fill.add_argument(
        "--marginal", action="store_true", help="also each mask by itself, and the completion that this would give"
    )
    for command in (embed, fill):
        command.add_argument(
            "--checkpoint",
            type=user_path,
            required=True,
            help="run folder (its newest checkpoint) or checkpoint folder",
        )
        command.add_argument("--overwrite", action="store_true", help="replace the table if it exists")
        command.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _check_files(options: argparse.Namespace, inputs: list[str]) -> None:
    """What is wrong with the files, before the seconds that loading a checkpoint takes."""
    from exlm_dist.tables.records import column_names, expand_inputs
    from exlm_dist.tables.table_writer import TableWriter

    TableWriter(options.out, options.overwrite)
    for path in expand_inputs(inputs, input_options(options)):
        column_names(path, input_options(options))


def _embed(options: argparse.Namespace) -> int:
    from exlm_dist.inference.embed_file import embed_file
    from exlm_dist.inference.loading import load_checkpoint

    _check_files(options, options.inputs)
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


def _fill(options: argparse.Namespace) -> int:
    from exlm_dist.inference.fill import FillSettings, fill_text
    from exlm_dist.inference.fill_file import described, fill_file
    from exlm_dist.inference.loading import load_checkpoint

    if bool(options.texts) == bool(options.input) or bool(options.input) != bool(options.out):
        raise ConfigError("give texts with masks, or a file with --input and --out.")
    if not options.sample and (options.temperature != 1.0 or options.seed):
        raise ConfigError("--temperature and --seed are of random completions: say how many with --sample N.")
    settings = FillSettings(options.top, options.beam, options.sample, options.temperature, options.seed)
    if options.input:
        _check_files(options, options.input)
    loaded = load_checkpoint(options.checkpoint, device=options.device)
    if options.input:
        print(
            fill_file(
                loaded,
                options.input,
                options.out,
                options=input_options(options),
                settings=settings,
                marginal=options.marginal,
                overwrite=options.overwrite,
            )
        )
        return 0
    for text in options.texts:
        filled = fill_text(loaded, text, settings)
        print(described(filled, marginal=options.marginal, sampled=settings.sample > 0))
    return 0
