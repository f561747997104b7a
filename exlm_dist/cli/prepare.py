"""`exlm prepare`: molecules and text into tokenized shards."""

from __future__ import annotations

import argparse
from typing import Any

from exlm_dist.cli.command import (
    Commands,
    add_command,
    add_group,
    add_input_options,
    add_random_smiles,
    input_options,
    positive,
)


def register(commands: Commands) -> None:
    """Add `prepare` and its kinds."""
    kinds = add_group(commands, "prepare", "turn SMILES or text into tokenized shards", metavar="KIND")
    smiles = add_command(
        kinds, "smiles", _smiles, "molecules as SMILES: .smi .txt .csv .tsv .jsonl .parquet, also compressed"
    )
    text = add_command(
        kinds,
        "text",
        _text,
        "text: .txt (documents separated by blank lines) .csv .tsv .jsonl .parquet, also compressed",
    )
    demo_smiles = add_command(kinds, "demo-smiles", _demo_smiles, "the built-in demo corpus of molecules")
    demo_text = add_command(kinds, "demo-text", _demo_text, "the built-in demo corpus of English text")
    for parser in (smiles, text):
        _add_input(parser)
    smiles.add_argument(
        "--stereo",
        choices=["keep", "drop"],
        help="stereo marks in the canonical SMILES (keep, or what --tokenizer says)",
    )
    smiles.add_argument(
        "--salts",
        choices=["keep", "largest_fragment"],
        help="what to do with molecules of several fragments (keep, or what --tokenizer says)",
    )
    for parser in (smiles, demo_smiles):
        add_random_smiles(parser)
    text.add_argument("--vocab-size", type=int, default=32000, help="size of the sentencepiece vocabulary")
    demo_smiles.add_argument("--molecules", type=int, default=24000, help="number of distinct molecules to build")
    demo_text.add_argument("--vocab-size", type=int, default=2000, help="size of the sentencepiece vocabulary")
    for parser in (smiles, text, demo_smiles, demo_text):
        parser.add_argument("--out", required=True, metavar="FOLDER", help="prepared folder to write")
        parser.add_argument("--max-length", type=int, default=128, help="longest sequence, BOS and EOS counted")
        parser.add_argument("--workers", type=positive, help="number of processes; default: the cores of this job")
        parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")


def _add_input(parser: argparse.ArgumentParser) -> None:
    """Add the options for a corpus of the user's own."""
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="input files or glob patterns")
    add_input_options(parser)
    parser.add_argument(
        "--valid-input",
        dest="valid_inputs",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of the held-out split; without them a fraction of --input makes it up",
    )
    parser.add_argument("--valid-fraction", type=float, default=0.02, help="fraction of the sequences in that split")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="use the tokenizer of this folder (prepared data or a checkpoint)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what is understood of each file, and what would become of its first rows; write nothing",
    )
    parser.add_argument(
        "--max-rejected",
        type=float,
        metavar="FRACTION",
        default=0.05,
        help="fraction of the rows that may be set aside; with more, nothing is written",
    )


def _smiles(options: argparse.Namespace) -> int:
    from exlm_dist.prepare.dry_run import preview_smiles
    from exlm_dist.prepare.smiles import prepare_smiles

    settings = _settings(options, input="inputs")
    if settings.pop("dry_run"):
        print(preview_smiles(**settings, options=input_options(options)))
    else:
        print(prepare_smiles(**settings))
    return 0


def _text(options: argparse.Namespace) -> int:
    from exlm_dist.prepare.dry_run import preview_text
    from exlm_dist.prepare.text import prepare_text

    settings = _settings(options, input="inputs")
    if settings.pop("dry_run"):
        print(preview_text(**settings, options=input_options(options)))
    else:
        print(prepare_text(**settings))
    return 0


def _demo_smiles(options: argparse.Namespace) -> int:
    from exlm_dist.prepare.demo.demo_molecules import prepare_demo_smiles

    print(prepare_demo_smiles(**_settings(options, molecules="count")))
    return 0


def _demo_text(options: argparse.Namespace) -> int:
    from exlm_dist.prepare.demo.demo_text import prepare_demo_text

    print(prepare_demo_text(**_settings(options)))
    return 0


def _settings(options: argparse.Namespace, **renamed: str) -> dict[str, Any]:
    """The command's own options, named as the parameters of the function that takes them."""
    own = {"command", "handler", "overrides", "local_rank"}
    return {renamed.get(name, name): value for name, value in vars(options).items() if name not in own}
