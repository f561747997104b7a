"""`exlm embed`: every row of the input files, in order, with its embedding beside its other columns."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np

from exlm_dist.checkpoint.reader import TOKENIZER_FOLDER
from exlm_dist.inference.embed import check_pooling, embed_encoded
from exlm_dist.inference.input_rows import InputRows
from exlm_dist.inference.loading import LoadedCheckpoint
from exlm_dist.tables.failed_rows import FailedRows, failed_rows_path
from exlm_dist.tables.records import InputOptions, Record
from exlm_dist.tables.table_writer import TableWriter
from exlm_dist.tokenizers.encoding import EncodedTexts, encode_as_saved
from exlm_dist.utils.cores import available_cores
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.outputs import user_path
from exlm_dist.utils.progress import Progress
from exlm_dist.utils.workers import ordered_map

EMBEDDING = "embedding"
#: Rows that are encoded by one task of a worker process, and then embedded.
CHUNK = 2048
#: Up to so many chunks are encoded in this process: sooner than worker processes would have started.
FEW_CHUNKS = 2


@dataclass
class Embedded:
    """What was done with the rows of the input."""

    out: Path
    rows: int = 0
    unknown: int = 0  # rows with a token that the vocabulary lacks
    truncated: int = 0
    failed: int = 0
    reason: str = ""  # why the first failed row did
    seconds: float = 0.0
    failures: Path | None = None  # the list of failed rows

    def __str__(self) -> str:
        speed = self.rows / self.seconds
        lines = [f"{self.out}: {self.rows - self.failed:,} of {self.rows:,} rows embedded, {speed:,.0f} rows/s"]
        if self.failed:
            lines.append(
                f"  {self.failed:,} failed (first: {self.reason}); null in the table, listed in {self.failures}"
            )
        if self.unknown:
            lines.append(f"  {self.unknown:,} have tokens that the vocabulary lacks, read as <unk>")
        if self.truncated:
            lines.append(f"  {self.truncated:,} were cut off at the longest input of the model")
        return "\n".join(lines)


def embed_file(
    loaded: LoadedCheckpoint,
    inputs: Sequence[str],
    out: Path,
    *,
    options: InputOptions,
    pooling: str = "mean",
    layer: int | None = None,
    truncate: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
) -> Embedded:
    """Embed the rows of `inputs` (paths and patterns) into the table `out`; see `embed_texts` for the settings.

    The columns of the input are carried through; the last column, `embedding`, is null in a row that failed. Failed
    rows are listed beside `out` with their reasons. ConfigError for options or columns that do not fit, DataError if
    no row can be used; nothing is written then.
    """
    check_pooling(loaded, pooling, layer)
    started = time.perf_counter()
    source = InputRows(inputs, options, loaded.tokenizer.domain, added=[EMBEDDING])
    encode = functools.partial(
        encode_as_saved, str(loaded.folder / TOKENIZER_FOLDER), max_tokens=loaded.max_tokens, truncate=truncate
    )
    result = Embedded(user_path(out))
    with (
        TableWriter(result.out, overwrite) as table,
        FailedRows(failed_rows_path(result.out)) as failed,
        Progress("embedding", "rows") as progress,
    ):
        for records, encoded in _encoded_chunks(source, encode, workers or available_cores()):
            vectors = np.full((len(records), loaded.config.model.width), np.nan, np.float32)
            vectors[encoded.rows] = embed_encoded(loaded, encoded, pooling, layer)
            for index, reason in sorted(encoded.failures.items()):
                record = records[index]
                result.reason = result.reason or f"{record.file} row {record.row}: {reason}"
                failed.add(record.file, record.row, reason, source.shown(record))
            table.write({**source.columns(records), EMBEDDING: vectors})
            result.rows, result.failed = result.rows + len(records), failed.count
            result.unknown, result.truncated = result.unknown + encoded.unknown, result.truncated + encoded.truncated
            progress.update(len(records))
        if result.rows == result.failed:
            raise DataError(source.none_usable(result.rows, result.reason))
    result.seconds, result.failures = time.perf_counter() - started, failed.path
    return result


def _encoded_chunks(
    source: InputRows, encode: functools.partial[EncodedTexts], workers: int
) -> Iterator[tuple[list[Record], EncodedTexts]]:
    """Chunks of rows with their encoding, in order; worker processes encode ahead of what the model does."""
    chunks = source.chunks(CHUNK)
    first = list(islice(chunks, FEW_CHUNKS + 1))
    pending: deque[list[Record]] = deque()

    def texts() -> Iterator[list[str | None]]:
        for records in chain(first, chunks):
            pending.append(records)
            yield [source.text(record) for record in records]

    for encoded in ordered_map(encode, texts(), workers if len(first) > FEW_CHUNKS else 1):
        records = pending.popleft()
        problems = {index: record.problem for index, record in enumerate(records) if record.problem}
        yield records, replace(encoded, failures={**encoded.failures, **problems})
