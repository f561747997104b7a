"""What became of every row that was read: kept, left out as a duplicate, or set aside; by file, and it adds up."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from exlm_dist.tables.failed_rows import HEADER, failed_line
from exlm_dist.tables.records import Row
from exlm_dist.utils.errors import DataError

#: Fraction of the rows that may be set aside.
MAX_REJECTED = 0.05
#: Rows after which an input with too many of them is not read to its end.
ROWS_BEFORE_LIMIT = 10_000
#: How many rows of a kind, and of how many kinds, an error shows.
EXAMPLES, KINDS = 2, 6


class Tally:
    """Counts the rows, and lists those set aside in `quarantine.tsv`, each with its position and the reason. A context
    manager. max_rejected: fraction of the rows that may be set aside."""

    def __init__(self, path: Path, max_rejected: float):
        self._max_rejected = max_rejected
        self._read: Counter[str] = Counter()
        self._kept: Counter[str] = Counter()
        self._duplicates: Counter[str] = Counter()
        self._aside: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.kept = self.done = 0  # rows kept, and rows of which it is known what became of them
        self.aside: Counter[str] = Counter()  # rows set aside, by kind of reason
        self.examples: defaultdict[str, list[tuple[Row, str]]] = defaultdict(list)
        self._file = open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n")
        self._file.write(HEADER)

    def __enter__(self) -> Tally:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def reading(self, rows: Iterable[Row]) -> Iterator[Row]:
        """`rows`, each counted as read."""
        for row in rows:
            self.count_read(row)
            yield row

    def count_read(self, row: Row) -> None:
        """Count a row as read."""
        self._read[row.file] += 1

    def keep(self, file: str, rows: int = 1) -> None:
        """Count rows of a file as kept."""
        self._kept[file] += rows
        self.kept += rows
        self.done += rows

    def duplicate(self, file: str) -> None:
        """Count a row of a file as equal to an earlier one."""
        self._duplicates[file] += 1
        self.done += 1

    def set_aside(self, row: Row, reason: str) -> None:
        """List `row`, and count it under the part of `reason` before the first colon."""
        kind = reason.split(":")[0]
        self._aside[row.file][kind] += 1
        self.aside[kind] += 1
        self.done += 1
        if len(self.examples[kind]) < EXAMPLES:
            self.examples[kind].append((row, reason))
        self._file.write(failed_line(row.file, row.row, reason, row.text))

    def check_limit(self, least_rows: int = ROWS_BEFORE_LIMIT) -> None:
        """DataError with examples, after at least so many rows, if too many of them were set aside."""
        counts, done = self.aside, self.done
        rejected = sum(counts.values())
        if done < least_rows or rejected <= self._max_rejected * done:
            return
        examples = [example for kind, _ in counts.most_common(KINDS) for example in self.examples[kind]]
        shown = "".join(f"\n  {row.file}, row {row.row}: {why}: {row.text[:80]!r}" for row, why in examples)
        enough = math.ceil(1000 * rejected / done) / 1000
        longer = "raise --max-length, " if counts["too long"] > rejected / 2 else ""
        raise DataError(
            f"{rejected:,} of {'the first ' if least_rows > 1 else ''}{done:,} rows ({rejected / done:.1%}) cannot be "
            f"used ({reasons(counts)}), more than --max-rejected {self._max_rejected:g} allows.{shown}\n"
            f"Correct the input, {longer}or say how it is to be read (--column, --format, --delimiter, --no-header), "
            f"or go on without these rows: --max-rejected {enough:g}."
        )

    def check_sum(self, written: int) -> None:
        """RuntimeError if not every row that was read is accounted for, or not as many as were kept are `written`."""
        for file, rows in self._read.items():
            parts = self._kept[file], self._duplicates[file], self._aside[file].total()
            if rows != sum(parts):
                raise RuntimeError(f"{file}: {rows} rows were read; kept, duplicates and set aside are {parts}")
        read = self._read.total()
        if read != self.done or self.kept != written:
            raise RuntimeError(f"{read} rows read, {self.done} accounted for; {self.kept} kept, {written} written")

    def statistics(self, written: int) -> dict[str, Any]:
        """The counts for the manifest, of all files and of each. RuntimeError as in `check_sum`."""
        self.check_sum(written)
        return {
            "rows": self._read.total(),
            "kept": self.kept,
            "duplicates": self._duplicates.total(),
            "quarantined": dict(self.aside),
            "files": [
                {
                    "name": Path(file).name,
                    "rows": rows,
                    "kept": self._kept[file],
                    "duplicates": self._duplicates[file],
                    "quarantined": dict(self._aside[file]),
                }
                for file, rows in self._read.items()
            ],
        }


def check_max_rejected(fraction: float) -> None:
    """DataError if `fraction` is none."""
    if not 0 <= fraction <= 1:
        raise DataError(f"max_rejected = {fraction:g}: must be from 0 to 1, a fraction of the rows.")


def reasons(counts: dict[str, int]) -> str:
    """'12 not SMILES, 3 empty': counts by kind, the highest first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {kind}" for kind, count in ordered)
