"""What preparing molecules and text have in common: sources, quarantine, held-out split, the finished folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from exlm_dist.data.manifest import MANIFEST, QUARANTINE, SCHEMA, SPLITS, TOKENIZER, read_manifest, sealed, split_entry
from exlm_dist.data.opening import open_dataset
from exlm_dist.prepare.shard_writer import ShardWriter
from exlm_dist.prepare.summary import Summary
from exlm_dist.tables.input_files import InputOptions, expand_inputs, resolved
from exlm_dist.tables.records import Row, read_rows, text_column
from exlm_dist.tokenizers.tokenizer import UNK, Tokenizer
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import sha256_file, write_json
from exlm_dist.utils.logs import get_logger
from exlm_dist.utils.staging import FolderKind, check_output, staged_folder

_log = get_logger(__name__)
Item = TypeVar("Item")
VALID_FRACTION = 0.02
VALID_CAP = 10_000
PREPARED = FolderKind("a folder of prepared data", lambda folder: (folder / MANIFEST).is_file(), MANIFEST)


@dataclass(frozen=True)
class Source:
    """Input rows and what identifies them: equal identities mean equal rows.

    canonical_under: the policy under which the rows are canonical molecules already; None for rows of unknown origin.
    of_lines: the files whose rows are lines of text, not whole texts.
    """

    identity: list[dict[str, Any]]
    rows: Callable[[], Iterable[Row]]
    canonical_under: dict[str, Any] | None = None
    of_lines: frozenset[str] = frozenset()

    @classmethod
    def of_files(cls, files: Mapping[Path, InputOptions], default_column: str) -> Source:
        """All rows of the files; name, size and SHA-256 identify a file."""
        identity = [{"name": path.name, "size": path.stat().st_size, "sha256": sha256_file(path)} for path in files]

        def rows() -> Iterator[Row]:
            for path, form in files.items():
                yield from read_rows(path, form, default_column)

        lines = frozenset(str(path) for path, form in files.items() if form.format == "txt")
        return cls(identity, rows, of_lines=lines)

    def is_blank(self, row: Row) -> bool:
        """Whether `row` is a blank line of a text file, which is no row."""
        return not row.problem and row.file in self.of_lines and not row.text.strip()


def find_sources(
    inputs: Sequence[str] | Source, valid_inputs: Sequence[str], options: InputOptions, default_column: str
) -> tuple[Source, Source | None]:
    """Sources of both splits: the files that paths and patterns name. DataError if one of them does not exist, or has
    no such column, before the first one is read."""
    train_files = {} if isinstance(inputs, Source) else read_forms(inputs, options, default_column)
    valid_files = read_forms(valid_inputs, options, default_column) if valid_inputs else {}
    train = inputs if isinstance(inputs, Source) else Source.of_files(train_files, default_column)
    return train, Source.of_files(valid_files, default_column) if valid_files else None


def read_forms(inputs: Sequence[str], options: InputOptions, default_column: str) -> dict[Path, InputOptions]:
    """The files that paths and patterns name, and how each is read. DataError as in `find_sources`."""
    forms = {path: resolved(path, options) for path in expand_inputs(inputs, options)}
    for path, form in forms.items():
        text_column(path, form, default_column)
    return forms


def choose_valid(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Mask of the held-out sequences, bool [n]: those with the smallest of `hashes`, uint64 [n], whatever their order.

    About `fraction` of them, at least one and at most `VALID_CAP` (more only if several have the same hash). DataError
    if none would be left to train on.
    """
    if len(hashes) < 2:
        raise DataError(
            f"{len(hashes)} usable sequence(s): at least 2 are needed, one to train on and one to hold out."
        )
    count = min(max(1, round(fraction * len(hashes))), VALID_CAP, len(hashes) - 1)
    chosen = hashes <= np.partition(hashes, count - 1)[count - 1]
    if chosen.all():
        raise DataError("all sequences are equal: nothing is left to train on besides the held-out ones.")
    return chosen


def check_fraction(fraction: float) -> None:
    """DataError if `fraction` cannot be that of the held-out split."""
    if not 0 < fraction <= 0.5:
        raise DataError(f"valid_fraction = {fraction:g}: must be above 0 and at most 0.5.")


def check_max_length(max_length: int) -> None:
    """DataError if two tokens do not fit between BOS and EOS."""
    if max_length < 4:
        raise DataError(f"max_length = {max_length}: must be at least 4 (BOS and EOS are counted).")


def chunked(items: Iterable[Item], size: int, weight: Callable[[Item], int] = lambda _: 1) -> Iterator[list[Item]]:
    """Lists of consecutive items, each closed once its weight reaches `size` (the last one may stay below)."""
    chunk: list[Item] = []
    total = 0
    for item in items:
        chunk.append(item)
        total += weight(item)
        if total >= size:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


class SplitWriter:
    """Writes the shards of both splits and counts what is in them."""

    def __init__(self, folder: Path, vocab_size: int, max_length: int):
        self._writers = [ShardWriter(folder, split, vocab_size=vocab_size) for split in SPLITS]
        self._histograms = [np.zeros(max_length + 1, dtype=np.int64) for _ in SPLITS]
        self._unknown = [0 for _ in SPLITS]

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers:
            writer.abort()

    def write(self, tokens: np.ndarray, lengths: np.ndarray, is_valid: np.ndarray) -> None:
        """A ragged batch: tokens [sum of lengths], lengths [m], is_valid bool [m]."""
        in_valid = np.repeat(is_valid, lengths)
        for index, (token_mask, sequence_mask) in enumerate(((~in_valid, ~is_valid), (in_valid, is_valid))):
            part, sizes = tokens[token_mask], lengths[sequence_mask]
            self._writers[index].write(part, sizes)
            self._histograms[index] += np.bincount(sizes + 2, minlength=len(self._histograms[index]))
            self._unknown[index] += int(np.count_nonzero(part == UNK))

    def close(self, forms: int = 1) -> dict[str, Any]:
        """Finish the shards; returns the `splits` part of the manifest. `forms`: in which the training split has each
        molecule, one after another. DataError if a split is empty."""
        splits = {
            split: split_entry(split, writer.close(), unknown, histogram.tolist())
            for split, writer, histogram, unknown in zip(SPLITS, self._writers, self._histograms, self._unknown)
        }
        if forms > 1:
            splits["train"]["forms"] = forms
        return splits


def request_for(domain: str, train: Source, valid: Source | None, settings: dict[str, Any]) -> dict[str, Any]:
    """All that the result depends on: equal requests have equal results."""
    return {"domain": domain, "inputs": train.identity, "valid_inputs": valid.identity if valid else [], **settings}


def check_out(out: Path, overwrite: bool) -> None:
    """OutputError, before any input is read, if `out` may not or cannot be written."""
    if overwrite or not PREPARED.matches(out):  # a finished one is compared with the request
        check_output(out, PREPARED, overwrite)


def prepare_folder(
    out: Path, request: dict[str, Any], overwrite: bool, work: Callable[[Path], dict[str, Any]]
) -> Summary:
    """Let `work` fill a staged folder and return the manifest's content; seal that and publish the folder at `out`.

    A finished `out` of the same `request` is reused; one of another request is a DataError unless `overwrite`.
    """
    start = time.monotonic()
    if not overwrite and PREPARED.matches(out):
        return _reuse(out, request)
    with staged_folder(out, PREPARED, overwrite=overwrite) as folder:
        content = work(folder)
        _flush(folder / QUARANTINE)
        manifest = sealed({"schema": SCHEMA, "request": request, **content})
        write_json(folder / MANIFEST, manifest)
    return Summary(out, manifest, time.monotonic() - start)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Save into the prepared folder; returns the `tokenizer` part of the manifest."""
    tokenizer.save(folder / TOKENIZER)
    files = {f"{TOKENIZER}/{path.name}": sha256_file(path) for path in sorted((folder / TOKENIZER).iterdir())}
    return {"fingerprint": tokenizer.fingerprint, "files": files}


def _reuse(out: Path, request: dict[str, Any]) -> Summary:
    manifest = read_manifest(out)
    before = manifest["request"]
    changed = sorted(key for key in before.keys() | request.keys() if before.get(key) != request.get(key))
    if changed:
        said = "; ".join(f"{key}: {_short(before.get(key))} then, {_short(request.get(key))} now" for key in changed)
        raise DataError(
            f"{out}: holds data that was prepared differently ({said}). "
            "Choose another --out, or replace it with --overwrite."
        )
    for split in SPLITS:
        open_dataset(out, split).close()
    _log.info("%s is already prepared from the same input and settings", out)
    return Summary(out, manifest, 0.0, reused=True)


def _short(value: Any) -> str:
    if isinstance(value, list):
        names = (str(item.get("name", item)) if isinstance(item, dict) else str(item) for item in value[:5])
        return ", ".join(names) or "none"
    return str(value)[:100]


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
