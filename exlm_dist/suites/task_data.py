"""The data of a task: the rows that can be used, their labels, the parts they are divided into.

None of it depends on a checkpoint, so that all of them are judged on the same rows; what a checkpoint reads of them,
and what it learns, is made by `TaskData.encode` and `TaskData.criterion`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.finetuning.criterion import Criterion, TargetCriterion
from exlm_dist.finetuning.dataset import Examples, FailedRow
from exlm_dist.finetuning.finetune_settings import TrainingSettings
from exlm_dist.finetuning.inputs import encode_inputs
from exlm_dist.finetuning.splits import Parts, repeated_rows, split_hash
from exlm_dist.finetuning.targets import Target, class_counts, with_scaling
from exlm_dist.suites.suite import OFFICIAL
from exlm_dist.tables.columns import kind_of
from exlm_dist.tokenizers import Tokenizer
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import fingerprint_of, sha256_file


@dataclass(frozen=True)
class EncodedTask:
    """What a checkpoint reads: m examples, each of one of the rows; of a row there may be several.

    Args:
        rows: int64 [m]. truncated: rows that have lost their end. unknown: rows with a token that the vocabulary lacks.
    """

    examples: Examples
    rows: np.ndarray
    truncated: int
    unknown: int

    def of_parts(self, parts: Parts) -> dict[str, Examples]:
        """The examples of each part."""
        return {part: self.examples.take(np.flatnonzero(np.isin(self.rows, rows))) for part, rows in parts.items()}


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """The used rows of a task: n rows with at least one label.

    Args:
        sha256: see `hash_of_files`. columns: inputs by name, each [n]. keys: equal for two inputs that are the same,
        [n]. places: file and number of each row, [n]. labels: float64 [n, targets], NaN: missing. undefined: columns of
        labels that have no two distinct ones, which are left out. official: the parts that the files themselves are.
    """

    files: tuple[Path, ...]
    sha256: str
    columns: Mapping[str, list[str]]
    keys: list[str]
    places: list[tuple[str, int]]
    targets: tuple[Target, ...]
    labels: np.ndarray
    failed: list[FailedRow]
    undefined: tuple[str, ...] = ()
    official: Parts = field(default_factory=dict)

    @property
    def pooled(self) -> bool:
        """Whether what is learned of it is pooled (see `Criterion`)."""
        return True

    def split(self, name: str) -> Parts:
        """The rows of each part. DataError if nothing can be learned from a part, or measured on it."""
        assert name == OFFICIAL
        return self.official

    def encode(self, tokenizer: Tokenizer, max_tokens: int) -> EncodedTask:
        """What a checkpoint reads of the rows; `max_tokens` without BOS and EOS. DataError if it cannot read one."""
        encoded = encode_inputs(tokenizer, list(self.columns.values()), max_tokens=max_tokens, truncate=True)
        if encoded.failures:
            row, reason = next(iter(encoded.failures.items()))
            file, number = self.places[row]
            raise DataError(
                f"{file}: row {number}: {reason} ({len(encoded.failures)} rows that other checkpoints can read). "
                "Evaluate this one in another --out, on a file without these rows."
            )
        examples = Examples(encoded.tokens, encoded.lengths, self.labels)
        return EncodedTask(examples, np.arange(len(self.labels)), encoded.truncated, encoded.unknown)

    def criterion(self, encoded: EncodedTask, parts: Parts, settings: TrainingSettings) -> Criterion:
        """What is learned, and how it is judged."""
        return TargetCriterion(with_scaling(self.targets, self.labels[parts["train"]], settings.scale_targets))

    def described(self) -> dict[str, Any]:
        """What is recorded of it, as JSON has it."""
        return {
            "files": [str(path) for path in self.files],
            "sha256": self.sha256,
            "rows": {"read": len(self.places) + len(self.failed), "used": len(self.places)},
            "failed": [{"row": one.row, "reason": one.reason, "text": one.text} for one in self.failed],
            "duplicates": sum(count - 1 for count in Counter(self.keys).values()),
            "targets": [target.name for target in self.targets],
            "undefined_targets": list(self.undefined),
        }

    def described_split(self, parts: Parts) -> dict[str, Any]:
        """What is recorded of a split: its hash, rows and labels of each part, and inputs that parts have in common."""
        counts = {
            part: {target.name: class_counts(target, self.labels[rows, n]) for n, target in enumerate(self.targets)}
            for part, rows in parts.items()
        }
        return {
            "hash": split_hash(parts),
            "sizes": {part: len(rows) for part, rows in parts.items()},
            "counts": counts,
            "repeated": repeated_rows(self.keys, parts),
        }


def hash_of_files(files: Sequence[Path]) -> str:
    """SHA-256 of a file, or of the hashes of several."""
    hashes = [sha256_file(path) for path in files]
    return hashes[0] if len(hashes) == 1 else fingerprint_of({"files": hashes})


def check_used(place: object, used: int, failed: Sequence[FailedRow], remedy: str) -> None:
    """DataError, with the reason of the first, if no row or less than half of them can be used."""
    read = used + len(failed)
    if used and used >= read / 2:
        return
    first = f" (the first: {failed[0].file}: row {failed[0].row}: {failed[0].reason})" if failed else ""
    raise DataError(f"{place}: {len(failed)} of {read} rows cannot be used{first}. {remedy}")


def is_missing(value: str | None) -> bool:
    """Whether a cell has no label."""
    return value is None or kind_of(value) == "missing"
