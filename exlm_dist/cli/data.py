"""`exlm data`: WebDataset shards of others as training data, and what is in a folder of data."""

from __future__ import annotations

import argparse

from exlm_dist.cli.command import Commands, add_command, add_group, add_random_smiles, positive
from exlm_dist.utils.errors import EXIT_DATA, EXIT_DONE


def register(commands: Commands) -> None:
    """Add `data` and its commands."""
    kinds = add_group(
        commands,
        "data",
        "index WebDataset shards; verify, repair, look at data",
        metavar="ACTION",
    )
    _add_index(kinds)
    verify = add_command(kinds, "verify", _verify, "read every file, and name what is damaged")
    repair = add_command(kinds, "repair", _repair, "replace what is damaged by the files of a copy")
    repair.add_argument(
        "--from",
        dest="copy",
        required=True,
        metavar="PLACE",
        help="the same data elsewhere; also an address",
    )
    stats = add_command(kinds, "stats", _stats, "counts, lengths, and what was set aside")
    inspect = add_command(kinds, "inspect", _inspect, "where a sample is stored, whether it is whole, and its text")
    sample = add_command(kinds, "sample", _sample, "print samples drawn at random")
    for parser in (verify, repair, stats, inspect, sample):
        parser.add_argument("folder", metavar="FOLDER", help="folder of data, or its address")
    inspect.add_argument("samples", metavar="ID", type=int, nargs="+", help="number of a sample in the split")
    for parser in (inspect, sample):
        parser.add_argument("--split", choices=["train", "valid"], default="train", help="which split")
    sample.add_argument("--count", type=positive, default=5, help="how many")
    sample.add_argument("--seed", type=int, default=0, help="decides which")


def _add_index(kinds: Commands) -> None:
    index = add_command(
        kinds,
        "index",
        _index,
        "make a folder of data of WebDataset shards, which stay where they are and are tokenized in training",
    )
    index.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="tars: paths or addresses (http, s3, gs, hf), {000..127}, quoted *"
    )
    index.add_argument("--tokenizer", required=True, metavar="FOLDER", help="prepared data, a checkpoint, or a .model")
    index.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    index.add_argument(
        "--ending",
        dest="endings",
        nargs="+",
        default=[],
        metavar="ENDING",
        help="of the members that are samples, such as txt or json.gz; needed if there are several that could be",
    )
    index.add_argument("--field", metavar="NAME", help="of JSON objects; default: text, of molecules smiles")
    index.add_argument("--max-length", type=int, default=128, help="longest sequence, BOS and EOS counted")
    index.add_argument("--valid", nargs="+", default=[], metavar="SHARDS", help="tars of the held-out split")
    index.add_argument("--valid-fraction", type=float, default=0.02, help="fraction of the samples, without --valid")
    index.add_argument(
        "--max-rejected", type=float, default=0.05, metavar="FRACTION", help="of the samples that may be set aside"
    )
    add_random_smiles(index)
    index.add_argument("--workers", type=positive, help="number of processes; default: the cores of this job")
    index.add_argument("--overwrite", action="store_true", help="replace what is in --out")


def _index(options: argparse.Namespace) -> int:
    from exlm_dist.prepare.index_shards import index_shards

    summary = index_shards(
        options.shards,
        options.out,
        tokenizer=options.tokenizer,
        endings=options.endings,
        field=options.field,
        max_length=options.max_length,
        valid_patterns=options.valid,
        valid_fraction=options.valid_fraction,
        max_rejected=options.max_rejected,
        random_smiles=options.random_smiles,
        random_seed=options.random_seed,
        workers=options.workers,
        overwrite=options.overwrite,
    )
    print(summary)
    return EXIT_DONE


def _verify(options: argparse.Namespace) -> int:
    from exlm_dist.prepare.data_check import verify_data

    count = 0
    for problem in verify_data(options.folder):
        print(problem)
        count += not problem.startswith(" ")
    print(f"{count} problem(s)" if count else "whole: every file has the content that the manifest says")
    return EXIT_DATA if count else EXIT_DONE


def _repair(options: argparse.Namespace) -> int:
    from exlm_dist.prepare.data_repair import repair_data

    repairs = []
    for repair in repair_data(options.folder, options.copy):
        print(repair)
        repairs.append(repair)
    failed = sum(bool(repair.failure) for repair in repairs)
    print(
        f"{len(repairs) - failed} file(s) replaced, {failed} still damaged" if repairs else "whole: nothing to repair"
    )
    return EXIT_DATA if failed else EXIT_DONE


def _stats(options: argparse.Namespace) -> int:
    from exlm_dist.prepare.data_check import describe_data

    print(describe_data(options.folder))
    return EXIT_DONE


def _inspect(options: argparse.Namespace) -> int:
    import numpy as np

    from exlm_dist.prepare.data_check import look_up

    found = look_up(options.folder, options.split, np.array(options.samples, np.int64))
    print("\n".join(map(str, found)))
    return EXIT_DONE if all(where.expected == where.got for where in found) else EXIT_DATA


def _sample(options: argparse.Namespace) -> int:
    from exlm_dist.prepare.data_check import draw, look_up

    ids = draw(options.folder, options.split, options.count, options.seed)
    print("\n".join(map(str, look_up(options.folder, options.split, ids))))
    return EXIT_DONE
