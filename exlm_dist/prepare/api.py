"""`prepare_smiles` and `prepare_text`: input files to a folder of shards with index, tokenizer and manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exlm_dist.prepare.folder import VALID_FRACTION, Source, check_fraction, check_max_length, prepare_folder
from exlm_dist.prepare.summary import Summary
from exlm_dist.prepare.workers import default_workers
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.utils.errors import DataError


def prepare_smiles(
    inputs: Sequence[str],
    out: Path | str,
    *,
    column: str | None = None,
    max_length: int = 512,
    stereo: str | None = None,
    salts: str | None = None,
    valid_inputs: Sequence[str] = (),
    valid_fraction: float = VALID_FRACTION,
    min_count: int = 1,
    workers: int | None = None,
    tokenizer: Path | str | None = None,
    overwrite: bool = False,
) -> Summary:
    """Molecules of `inputs` (files and patterns) to the prepared folder `out`.

    column: of csv, tsv, parquet, jsonl. max_length: longest sequence kept, in tokens, BOS and EOS counted. stereo,
    salts: see `molecules.make_policy`; default 'keep', or the policy of a given tokenizer. valid_inputs: held-out
    files; else `valid_fraction` of the molecules. min_count: least count of a token of the vocabulary. tokenizer:
    folder of a SMILES tokenizer to use. Raises DataError for input that cannot be used; single rows that cannot go to
    `quarantine.tsv`.
    """
    train = Source.of_files(inputs, column, "smiles")
    valid = Source.of_files(valid_inputs, column, "smiles") if valid_inputs else None
    return prepare_molecules(
        train,
        out,
        valid=valid,
        column=column,
        max_length=max_length,
        stereo=stereo,
        salts=salts,
        valid_fraction=valid_fraction,
        min_count=min_count,
        workers=workers,
        tokenizer=tokenizer,
        overwrite=overwrite,
    )


def prepare_molecules(
    train: Source,
    out: Path | str,
    *,
    valid: Source | None = None,
    column: str | None = None,
    max_length: int = 512,
    stereo: str | None = None,
    salts: str | None = None,
    valid_fraction: float = VALID_FRACTION,
    min_count: int = 1,
    workers: int | None = None,
    tokenizer: Path | str | None = None,
    overwrite: bool = False,
) -> Summary:
    """`prepare_smiles` from any source of rows."""
    from exlm_dist.prepare.smiles import SmilesJob, policy_for

    check_fraction(valid_fraction)
    check_max_length(max_length)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    if given is not None and given.domain != "smiles":
        raise DataError(
            f"{tokenizer}: a {given.domain} tokenizer; molecules need one that `exlm prepare smiles` wrote."
        )
    policy = policy_for(given, stereo, salts)
    job = SmilesJob(train, valid, policy, given, max_length, valid_fraction, min_count, workers or default_workers())
    request = _request(
        "smiles",
        train,
        valid,
        {
            "column": column,
            "max_length": max_length,
            "policy": policy,
            "valid_fraction": None if valid else valid_fraction,
            "min_count": None if given else min_count,
            "tokenizer": given and given.fingerprint,
        },
    )
    return prepare_folder(Path(out), request, overwrite, job.run)


def prepare_text(
    inputs: Sequence[str],
    out: Path | str,
    *,
    vocab_size: int = 32_000,
    column: str | None = None,
    max_length: int = 512,
    valid_inputs: Sequence[str] = (),
    valid_fraction: float = VALID_FRACTION,
    model_type: str = "unigram",
    sample_bytes: int = 50_000_000,
    workers: int | None = None,
    tokenizer: Path | str | None = None,
    overwrite: bool = False,
) -> Summary:
    """Text of `inputs` (files and patterns) to the prepared folder `out`.

    Documents are separated by blank lines in txt files and are one per row elsewhere; they are joined in order and cut,
    at word starts, into blocks of at most max_length tokens with BOS and EOS. vocab_size, model_type ('unigram' or
    'bpe'), sample_bytes: of the sentencepiece model trained here; or `tokenizer`: a folder with a text tokenizer, or a
    sentencepiece `.model` file. The rest as in `prepare_smiles`.
    """
    train = Source.of_files(inputs, column, "text")
    valid = Source.of_files(valid_inputs, column, "text") if valid_inputs else None
    return prepare_documents(
        train,
        out,
        valid=valid,
        vocab_size=vocab_size,
        column=column,
        max_length=max_length,
        valid_fraction=valid_fraction,
        model_type=model_type,
        sample_bytes=sample_bytes,
        workers=workers,
        tokenizer=tokenizer,
        overwrite=overwrite,
    )


def prepare_documents(
    train: Source,
    out: Path | str,
    *,
    valid: Source | None = None,
    vocab_size: int = 32_000,
    column: str | None = None,
    max_length: int = 512,
    valid_fraction: float = VALID_FRACTION,
    model_type: str = "unigram",
    sample_bytes: int = 50_000_000,
    workers: int | None = None,
    tokenizer: Path | str | None = None,
    overwrite: bool = False,
) -> Summary:
    """`prepare_text` from any source of rows."""
    from exlm_dist.prepare.text import TextJob, given_tokenizer

    check_fraction(valid_fraction)
    check_max_length(max_length)
    if model_type not in ("unigram", "bpe"):
        raise DataError(f"model_type = {model_type!r}: one of unigram, bpe is expected.")
    given = None if tokenizer is None else given_tokenizer(Path(tokenizer))
    job = TextJob(
        train,
        valid,
        given,
        vocab_size,
        model_type,
        sample_bytes,
        max_length,
        valid_fraction,
        workers or default_workers(),
    )
    request = _request(
        "text",
        train,
        valid,
        {
            "column": column,
            "max_length": max_length,
            "valid_fraction": None if valid else valid_fraction,
            "vocab_size": None if given else vocab_size,
            "model_type": None if given else model_type,
            "sample_bytes": None if given else sample_bytes,
            "tokenizer": given and given.fingerprint,
        },
    )
    return prepare_folder(Path(out), request, overwrite, job.run)


def _request(domain: str, train: Source, valid: Source | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What the result depends on; equal requests have equal results."""
    return {"domain": domain, "inputs": train.identity, "valid_inputs": valid.identity if valid else [], **settings}
