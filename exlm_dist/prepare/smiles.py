"""Molecules to shards: parse and canonicalise in parallel, drop duplicates, count tokens, encode."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from exlm_dist.data.manifest import QUARANTINE, TOKENIZER
from exlm_dist.prepare.folder import (
    Quarantine,
    Source,
    SplitWriter,
    choose_valid,
    chunked,
    content_hash,
    is_utf8,
    save_tokenizer,
)
from exlm_dist.prepare.progress import Progress
from exlm_dist.prepare.readers import Row
from exlm_dist.prepare.workers import ordered_map
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer, split_smiles
from exlm_dist.utils.errors import DataError

ROWS_PER_TASK = 512
MOLECULES_PER_TASK = 8192
#: Rows after which, and share of unreadable ones from which, an input is refused; the rest of it is not read.
HOPELESS_ROWS, HOPELESS = 5000, 0.99
#: Molecules below which counting and encoding (some 50,000/s) are done before other processes would have started.
WORTH_WORKERS = 200_000
UNPARSABLE = "not SMILES"


def policy_for(given: SmilesTokenizer | None, stereo: str | None, salts: str | None) -> dict[str, Any]:
    """The canonicalisation policy: that of a given tokenizer, else the one asked for; DataError if they differ."""
    from exlm_dist.tokenizers.molecules import make_policy

    if given is None:
        return make_policy(stereo or "keep", salts or "keep")
    for name, asked in (("stereo", stereo), ("salts", salts)):
        if asked is not None and asked != given.policy[name]:
            raise DataError(
                f"{name} = {asked!r}, but the given tokenizer was made with {name} = {given.policy[name]!r}. "
                f"Leave --{name} out, or make a new tokenizer."
            )
    return dict(given.policy)


@dataclass(frozen=True)
class SmilesJob:
    """One preparation; `run` fills the staged folder and returns the manifest's content."""

    train: Source
    valid: Source | None
    policy: Mapping[str, Any]
    tokenizer: SmilesTokenizer | None
    max_length: int
    valid_fraction: float
    min_count: int
    workers: int

    def run(self, folder: Path) -> dict[str, Any]:
        with TemporaryDirectory(prefix="spool.", dir=folder) as spool, Quarantine(folder / QUARANTINE) as quarantine:
            molecules = _Molecules(Path(spool) / "molecules.smi", quarantine)
            self._collect(molecules)
            if self.valid is not None:
                is_valid = np.arange(len(molecules.hashes)) < molecules.held_out
            else:
                is_valid = choose_valid(np.frombuffer(molecules.hashes, dtype=np.uint64), self.valid_fraction)
            tokenizer = self.tokenizer or self._make_tokenizer(molecules, is_valid)
            described = save_tokenizer(tokenizer, folder)
            splits = self._encode(molecules, is_valid, tokenizer, folder)
        return {
            "domain": "smiles",
            "vocab_size": tokenizer.vocab_size,
            "max_length": self.max_length,
            "policy": dict(self.policy),
            "tokenizer": described,
            "splits": splits,
            "statistics": {
                "unit": "rows",
                "rows": molecules.rows,
                "duplicates": molecules.duplicates,
                "quarantined": dict(quarantine.counts),
            },
        }

    def _collect(self, molecules: _Molecules) -> None:
        """Held-out files first, so that a molecule in both is held out."""
        with molecules, Progress("molecules", "rows") as progress:
            for source in filter(None, (self.valid, self.train)):
                trusted = source.canonical_under == self.policy
                clean = partial(clean_rows, None if trusted else dict(self.policy), self.max_length)
                workers = 1 if trusted else self.workers
                for results in ordered_map(clean, chunked(source.rows(), ROWS_PER_TASK), workers):
                    molecules.add(results)
                    progress.update(len(results))
                if source is self.valid:
                    molecules.held_out = len(molecules.hashes)
        if molecules.rows == molecules.quarantine.counts["empty"]:
            raise DataError("no input row holds anything.")
        molecules.refuse_if_hopeless(1)
        if not molecules.hashes:
            row, reason = next(iter(molecules.quarantine.first.values()))
            raise DataError(
                f"none of {molecules.rows:,} rows can be used (first: {row.file}, row {row.row}: {reason}). "
                "Raise --max-length, or check the input."
            )

    def _make_tokenizer(self, molecules: _Molecules, is_valid: np.ndarray) -> SmilesTokenizer:
        """Vocabulary of the training split."""
        counts: Counter[str] = Counter()
        train = (smiles for smiles, held_out in zip(molecules.read(), is_valid.tolist()) if not held_out)
        for part in ordered_map(count_tokens, chunked(train, MOLECULES_PER_TASK), self._light_workers(is_valid)):
            counts.update(part)
        return SmilesTokenizer.from_counts(counts, self.policy, self.min_count)

    def _light_workers(self, molecules: np.ndarray) -> int:
        return self.workers if len(molecules) > WORTH_WORKERS else 1

    def _encode(
        self, molecules: _Molecules, is_valid: np.ndarray, tokenizer: SmilesTokenizer, folder: Path
    ) -> dict[str, Any]:
        encode = partial(encode_molecules, str(folder / TOKENIZER))
        chunks = chunked(molecules.read(), MOLECULES_PER_TASK)
        first = 0
        with (
            SplitWriter(folder, tokenizer.vocab_size, self.max_length) as writer,
            Progress("shards", "molecules", len(is_valid)) as progress,
        ):
            for tokens, lengths in ordered_map(encode, chunks, self._light_workers(is_valid)):
                writer.write(tokens, lengths, is_valid[first : first + len(lengths)])
                first += len(lengths)
                progress.update(len(lengths))
            return writer.close()


class _Molecules:
    """The distinct canonical molecules in order, one a line in a file, with their hashes."""

    def __init__(self, path: Path, quarantine: Quarantine):
        self._path = path
        self._file = open(path, "w", encoding="ascii", newline="\n")
        self._seen: set[int] = set()
        self.quarantine = quarantine
        self.hashes = array("Q")
        self.rows = self.duplicates = self.held_out = 0

    def __enter__(self) -> _Molecules:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, results: list[tuple[Row | None, str]]) -> None:
        """Results of `clean_rows`."""
        for row, text in results:
            self.rows += 1
            if row is not None:
                self.quarantine.add(row, text)
                continue
            key = content_hash(text.encode())
            if key in self._seen:
                self.duplicates += 1
                continue
            self._seen.add(key)
            self.hashes.append(key)
            self._file.write(text + "\n")
        self.refuse_if_hopeless(HOPELESS_ROWS)

    def refuse_if_hopeless(self, rows: int) -> None:
        """DataError when, of `rows` or more that are not empty, nearly none reads as SMILES."""
        counts = self.quarantine.counts
        filled, wrong = self.rows - counts["empty"], counts[UNPARSABLE] + counts["not UTF-8"]
        if filled < rows or wrong < HOPELESS * filled or UNPARSABLE not in self.quarantine.first:
            return
        row, _ = self.quarantine.first[UNPARSABLE]
        hint = (
            "it looks like text: use `exlm prepare text`"
            if " " in row.text.strip() or len(row.text) > 200
            else "is this the right column (--column)? Text is prepared with `exlm prepare text`"
        )
        raise DataError(
            f"{wrong:,} of {filled:,} rows cannot be read as SMILES "
            f"(first: {row.file}, row {row.row}: {row.text[:60]!r}); {hint}."
        )

    def read(self) -> Iterator[str]:
        with open(self._path, encoding="ascii", newline="\n") as file:
            for line in file:
                yield line[:-1]


def clean_rows(policy: Mapping[str, Any] | None, max_length: int, rows: list[Row]) -> list[tuple[Row | None, str]]:
    """For each row (None, canonical SMILES), or (the row, why it cannot be used). policy None: the rows are canonical
    already.
    """
    from exlm_dist.tokenizers.molecules import MoleculeError, canonical_smiles

    results: list[tuple[Row | None, str]] = []
    for row in rows:
        problem, smiles = row.problem, ""
        parts = row.text.split()
        if not problem and not parts:
            problem = "empty"
        elif not problem and not is_utf8(row.text):
            problem = "not UTF-8"
        elif not problem and len(parts) > 1 and not parts[1].startswith("|"):  # |...| is a CXSMILES extension
            problem = UNPARSABLE
        if not problem:
            try:
                smiles = parts[0] if policy is None else canonical_smiles(parts[0], policy)
                problem = _too_long_or_odd(smiles, max_length)
            except MoleculeError as error:
                problem = str(error)
        results.append((row, problem) if problem else (None, smiles))
    return results


def count_tokens(molecules: list[str]) -> Counter[str]:
    """How often each token occurs."""
    counts: Counter[str] = Counter()
    for smiles in molecules:
        counts.update(split_smiles(smiles))
    return counts


def encode_molecules(folder: str, molecules: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the molecules with the tokenizer saved in `folder`: (tokens [sum of lengths], lengths [m])."""
    return _loaded(folder).encode_batch(molecules)


def _too_long_or_odd(smiles: str, max_length: int) -> str:
    tokens = split_smiles(smiles)
    if tokens is None:
        return "not tokenisable: " + smiles[:80]
    return f"too long: {len(tokens) + 2} tokens, at most {max_length}" if len(tokens) + 2 > max_length else ""


@lru_cache(maxsize=1)
def _loaded(folder: str) -> SmilesTokenizer:
    return load_tokenizer(Path(folder))
