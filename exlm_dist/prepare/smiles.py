"""`prepare_smiles`: molecules to shards: parse and canonicalise in parallel, drop duplicates, count tokens, encode."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from exlm_dist.data.manifest import QUARANTINE, SPLITS, TOKENIZER, epoch_size
from exlm_dist.data.random_smiles import RandomSmiles
from exlm_dist.prepare.folder import (
    VALID_FRACTION,
    Source,
    SplitWriter,
    check_fraction,
    check_max_length,
    check_out,
    choose_valid,
    chunked,
    find_sources,
    prepare_folder,
    request_for,
    save_tokenizer,
)
from exlm_dist.prepare.random_spool import RandomForms
from exlm_dist.prepare.summary import Summary
from exlm_dist.prepare.tally import MAX_REJECTED, Tally, check_max_rejected
from exlm_dist.tables.input_files import InputOptions
from exlm_dist.tables.records import Row
from exlm_dist.tokenizers import Tokenizer, load_tokenizer
from exlm_dist.tokenizers.molecules import MoleculeError, canonical_smiles, make_policy, smiles_in
from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer, split_smiles
from exlm_dist.utils.cores import available_cores
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import content_hash
from exlm_dist.utils.outputs import user_path
from exlm_dist.utils.progress import Progress
from exlm_dist.utils.workers import ordered_map

ROWS_PER_TASK = 512
MOLECULES_PER_TASK = 8192
#: An input is refused, and not read further, if after so many rows at least this fraction is unparsable.
HOPELESS_ROWS, HOPELESS = 5000, 0.99
#: Up to so many molecules, counting and encoding (some 50,000/s) end before worker processes would have started.
WORTH_WORKERS = 200_000
UNPARSABLE = "not SMILES"


def prepare_smiles(
    inputs: Sequence[str] | Source,
    out: Path | str,
    *,
    column: str | None = None,
    format: str | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
    max_length: int = 512,
    stereo: str | None = None,
    salts: str | None = None,
    valid_inputs: Sequence[str] = (),
    valid_fraction: float = VALID_FRACTION,
    min_count: int = 1,
    max_rejected: float = MAX_REJECTED,
    workers: int | None = None,
    tokenizer: Path | str | None = None,
    random_smiles: int = 0,
    random_seed: int = 0,
    overwrite: bool = False,
) -> Summary:
    """Prepare the molecules of `inputs` (paths and patterns, or any source of rows) as the folder `out`.

    column, format, delimiter, header: see `InputOptions`. max_length: of the sequences kept, in tokens, BOS and EOS
    counted. stereo, salts: see `make_policy`; default 'keep', or the policy of a given tokenizer. valid_inputs: files
    of the held-out split; default `valid_fraction` of the molecules. min_count: occurrences a token needs to enter the
    vocabulary. tokenizer: folder of a SMILES tokenizer to use instead of a new one. random_smiles: that each training
    molecule has beside the canonical one, drawn with random_seed. Raises DataError for input that cannot be used;
    single such rows go to `quarantine.tsv`, up to the fraction max_rejected of all rows.
    """
    check_fraction(valid_fraction)
    check_max_length(max_length)
    check_max_rejected(max_rejected)
    random = RandomSmiles(random_smiles, random_seed)
    out = user_path(out)
    check_out(out, overwrite)
    asked = InputOptions(column, format, delimiter, header)
    train, valid = find_sources(inputs, valid_inputs, asked, "smiles")
    given = None if tokenizer is None else given_tokenizer(tokenizer)
    policy = policy_for(given, stereo, salts)
    workers = workers or available_cores()
    job = SmilesJob(train, valid, policy, given, max_length, valid_fraction, min_count, max_rejected, workers, random)
    settings = {
        **asked.given(),
        "max_length": max_length,
        "policy": policy,
        "valid_fraction": None if valid else valid_fraction,
        "min_count": None if given else min_count,
        "tokenizer": given and given.fingerprint,
        **random.settings(),
    }
    return prepare_folder(out, request_for("smiles", train, valid, settings), overwrite, job.run)


def given_tokenizer(folder: Path | str) -> SmilesTokenizer:
    """The tokenizer in a folder; DataError if it is none of molecules."""
    tokenizer = load_tokenizer(folder)
    if not isinstance(tokenizer, SmilesTokenizer):
        raise DataError(
            f"{folder}: a {tokenizer.domain} tokenizer; molecules need one that `exlm prepare smiles` wrote."
        )
    return tokenizer


def policy_for(given: SmilesTokenizer | None, stereo: str | None, salts: str | None) -> dict[str, Any]:
    """The canonicalisation policy: that of a given tokenizer, else the one asked for; DataError if they differ."""
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
    """The preparation of one folder: `run` fills the staged folder and returns the manifest's content."""

    train: Source
    valid: Source | None
    policy: Mapping[str, Any]
    tokenizer: SmilesTokenizer | None
    max_length: int
    valid_fraction: float
    min_count: int
    max_rejected: float
    workers: int
    random: RandomSmiles

    def run(self, folder: Path) -> dict[str, Any]:
        with (
            TemporaryDirectory(prefix="spool.", dir=folder) as spool,
            Tally(folder / QUARANTINE, self.max_rejected) as tally,
        ):
            molecules = _Molecules(Path(spool) / "molecules.smi", tally)
            self._read(molecules)
            if self.valid is not None:
                is_valid = np.arange(len(molecules.hashes)) < molecules.held_out
            else:
                is_valid = choose_valid(np.frombuffer(molecules.hashes, dtype=np.uint64), self.valid_fraction)
            forms = RandomForms(Path(spool) / "random.smi", self.random)
            training, count = _of_training(molecules, is_valid), int(np.count_nonzero(~is_valid))
            forms.draw(training, count, self.policy, self.max_length - 2, self.workers)
            tokenizer = self.tokenizer or self._make_tokenizer(molecules, is_valid, forms)
            described = save_tokenizer(tokenizer, folder)
            splits = self._encode(molecules, is_valid, forms, tokenizer, folder)
        return {
            "domain": "smiles",
            "vocab_size": tokenizer.vocab_size,
            "max_length": self.max_length,
            "policy": dict(self.policy),
            "tokenizer": described,
            "splits": splits,
            "statistics": {
                "unit": "rows",
                **tally.statistics(sum(epoch_size(splits[split]) for split in SPLITS)),
                **forms.statistics(),
            },
        }

    def _read(self, molecules: _Molecules) -> None:
        """Read all rows, held-out files first, as the first of equal molecules stays. DataError if none is usable."""
        with molecules, Progress("molecules", "rows") as progress:
            for source in filter(None, (self.valid, self.train)):
                trusted = source.canonical_under == self.policy
                clean = partial(clean_rows, None if trusted else dict(self.policy), self.max_length)
                rows = molecules.tally.reading(row for row in source.rows() if not source.is_blank(row))
                workers = 1 if trusted else self.workers
                for results in ordered_map(clean, chunked(rows, ROWS_PER_TASK), workers):
                    molecules.add(results)
                    progress.update(len(results))
                if source is self.valid:
                    molecules.held_out = len(molecules.hashes)
        tally = molecules.tally
        if tally.done == tally.aside["empty"]:
            raise DataError("all rows of the input are empty." if tally.done else "the input has no rows.")
        molecules.refuse_if_hopeless(1)
        if not molecules.hashes:
            row, reason = next(iter(tally.examples.values()))[0]
            advice = "Raise --max-length, or check" if reason.startswith("too long") else "Check"
            raise DataError(
                f"none of {tally.done:,} rows can be used (first: {row.file}, row {row.row}: {reason}). "
                f"{advice} the input."
            )
        tally.check_limit(1)

    def _make_tokenizer(self, molecules: _Molecules, is_valid: np.ndarray, forms: RandomForms) -> SmilesTokenizer:
        """Vocabulary of the training split."""
        counts: Counter[str] = Counter()
        train = chain(_of_training(molecules, is_valid), forms.read())
        for part in ordered_map(count_tokens, chunked(train, MOLECULES_PER_TASK), self._workers_for(len(is_valid))):
            counts.update(part)
        return SmilesTokenizer.from_counts(counts, self.policy, self.min_count)

    def _workers_for(self, molecules: int) -> int:
        return self.workers if molecules > WORTH_WORKERS else 1

    def _encode(
        self,
        molecules: _Molecules,
        is_valid: np.ndarray,
        forms: RandomForms,
        tokenizer: SmilesTokenizer,
        folder: Path,
    ) -> dict[str, Any]:
        """Write the canonical SMILES to both splits, then the random ones to that of training."""
        encode = partial(encode_molecules, str(folder / TOKENIZER))
        chunks = chunked(chain(molecules.read(), forms.read()), MOLECULES_PER_TASK)
        total = len(is_valid) + self.random.count * forms.molecules
        first = 0
        with (
            SplitWriter(folder, tokenizer.vocab_size, self.max_length) as writer,
            Progress("shards", "sequences", total) as progress,
        ):
            for tokens, lengths in ordered_map(encode, chunks, self._workers_for(total)):
                held_out = np.zeros(len(lengths), bool)  # random SMILES never are
                canonical = is_valid[first : first + len(lengths)]
                held_out[: len(canonical)] = canonical
                writer.write(tokens, lengths, held_out)
                first += len(lengths)
                progress.update(len(lengths))
            return writer.close(forms=1 + self.random.count)


def _of_training(molecules: _Molecules, is_valid: np.ndarray) -> Iterator[str]:
    return (smiles for smiles, held_out in zip(molecules.read(), is_valid.tolist()) if not held_out)


class _Molecules:
    """The distinct canonical molecules in order, one per line of a file, and their hashes."""

    def __init__(self, path: Path, tally: Tally):
        self._path = path
        self._file = open(path, "w", encoding="ascii", newline="\n")
        self._seen: set[int] = set()
        self.tally = tally
        self.hashes = array("Q")
        self.held_out = 0

    def __enter__(self) -> _Molecules:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, results: list[CleanedRow]) -> None:
        """Store results of `clean_rows`. DataError as soon as the input turns out not to be SMILES."""
        for result in results:
            if result.unusable is not None:
                self.tally.set_aside(result.unusable, result.text)
                continue
            key = content_hash(result.text.encode())
            if key in self._seen:
                self.tally.duplicate(result.file)
                continue
            self._seen.add(key)
            self.hashes.append(key)
            self._file.write(result.text + "\n")
            self.tally.keep(result.file)
        self.refuse_if_hopeless(HOPELESS_ROWS)
        self.tally.check_limit()

    def refuse_if_hopeless(self, rows: int) -> None:
        """DataError if at least `rows` rows are not empty and nearly none of them is SMILES."""
        counts = self.tally.aside
        filled, wrong = self.tally.done - counts["empty"], counts[UNPARSABLE] + counts["not UTF-8"]
        if filled < rows or wrong < HOPELESS * filled or not counts[UNPARSABLE]:
            return
        row, _ = self.tally.examples[UNPARSABLE][0]
        hint = (
            "it looks like text: use `exlm prepare text`"
            if " " in row.text.strip() or len(row.text) > 200
            else "is this the right column (--column) and format (--format)? Text is prepared with `exlm prepare text`"
        )
        raise DataError(
            f"{wrong:,} of {filled:,} rows cannot be read as SMILES "
            f"(first: {row.file}, row {row.row}: {row.text[:60]!r}); {hint}."
        )

    def read(self) -> Iterator[str]:
        with open(self._path, encoding="ascii", newline="\n") as file:
            for line in file:
                yield line[:-1]


class CleanedRow(NamedTuple):
    """What became of a row of `file`: its canonical SMILES; or the row itself, and as text why it is unusable."""

    file: str
    text: str
    unusable: Row | None = None


def clean_rows(policy: Mapping[str, Any] | None, max_length: int, rows: list[Row]) -> list[CleanedRow]:
    """What becomes of each row. policy None: the rows are canonical."""
    results = []
    for row in rows:
        problem, smiles = row.problem, ""
        if not problem:
            try:
                smiles = smiles_in(row.text)
                smiles = smiles if policy is None else canonical_smiles(smiles, policy)
                problem = _token_problem(smiles, max_length)
            except MoleculeError as error:
                problem = str(error)
        results.append(CleanedRow(row.file, problem, row) if problem else CleanedRow(row.file, smiles))
    return results


def count_tokens(molecules: list[str]) -> Counter[str]:
    """How often each token occurs in the molecules."""
    counts: Counter[str] = Counter()
    for smiles in molecules:
        counts.update(split_smiles(smiles))
    return counts


def encode_molecules(folder: str, molecules: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the molecules by the tokenizer saved in `folder`: (tokens [sum of lengths], lengths [m])."""
    return _loaded(folder).encode_batch(molecules)


def _token_problem(smiles: str, max_length: int) -> str:
    tokens = split_smiles(smiles)
    if tokens is None:
        return "not tokenisable: " + smiles[:80]
    return f"too long: {len(tokens) + 2} tokens, at most {max_length}" if len(tokens) + 2 > max_length else ""


@lru_cache(maxsize=1)
def _loaded(folder: str) -> Tokenizer:
    return load_tokenizer(Path(folder))
