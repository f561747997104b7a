"""The sequences that checkpoints are asked about: a split of prepared data, or the rows of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.config import RunConfig, longest_expansion
from exlm_dist.data.manifest import MANIFEST
from exlm_dist.data.opening import open_dataset
from exlm_dist.data.recipe import Dataset
from exlm_dist.inference.input_rows import InputRows
from exlm_dist.inference.sequences import take_sequences
from exlm_dist.tables.records import InputOptions
from exlm_dist.tokenizers import Tokenizer, load_tokenizer
from exlm_dist.tokenizers.encoding import encode_texts
from exlm_dist.utils.errors import ConfigError, DataError
from exlm_dist.utils.files import sha256_file

VALID, TRAIN, ROWS = "valid", "train", "rows"
#: Rows that are read at a time, and unusable ones that are listed.
_CHUNK, LISTED = 4096, 5
#: Lengths of sequences that are read at a time.
_LOOKED_AT = 1 << 16


@dataclass(frozen=True)
class MaskedSource:
    """Where the sequences come from. part: the split of prepared data, or `ROWS` of a file of which `column` has the
    texts. fingerprint: equal for equal data."""

    path: Path
    part: str
    fingerprint: str
    column: str | None = None

    def open(self, tokenizer: Tokenizer) -> Dataset:
        """The sequences. DataError if the data is damaged, was prepared with another tokenizer, or has no usable row.
        Rows get the numbers that they have among those that can be used."""
        if self.part == ROWS:
            return read_texts(self.path, self.column, tokenizer)
        dataset = open_dataset(self.path, self.part)
        other = load_tokenizer(dataset.tokenizer_path).fingerprint
        if other != tokenizer.fingerprint:
            raise DataError(
                f"{self.path} was prepared with another tokenizer (fingerprint {other[:12]}) than the checkpoint's "
                f"({tokenizer.fingerprint[:12]}). Give --data prepared with it, or a file of rows."
            )
        return dataset


@dataclass
class TextRows:
    """Sequences in memory: tokens int32 [sum], lengths int64 [m]. failed: rows that cannot be used, in all `read`;
    reasons: of the first of them."""

    tokens: np.ndarray
    lengths: np.ndarray
    read_rows: int
    failed: int
    reasons: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.lengths)

    def preload(self, blocks: list[int]) -> None:
        """Nothing is to be read: all are in memory."""

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, lengths) of the sequences `ids`."""
        return take_sequences(self.tokens, self.lengths, ids)


def find_source(
    data: Path | None, split: str | None, column: str | None, configs: Sequence[tuple[str, RunConfig]]
) -> MaskedSource:
    """The data that the user names, or that the checkpoints, (name, settings) each, were trained on.

    DataError if it is not there; ConfigError for options that do not fit it, and for checkpoints of different data.
    """
    if data is None:
        places = {config.data.path: name for name, config in configs}
        if len(places) > 1:
            listed = ", ".join(f"{name}: {path}" for path, name in places.items())
            raise ConfigError(f"the checkpoints were trained on different data ({listed}): give --data.")
        data = Path(next(iter(places)))
    if data.is_file():
        if split is not None:
            raise ConfigError(f"--split is of prepared data, but {data} is a file of rows: all of them are used.")
        return MaskedSource(data, ROWS, sha256_file(data), column)
    if column is not None:
        raise ConfigError(f"--column is of a file of rows, but {data} is none: leave it out, or give a file.")
    if not (data / MANIFEST).is_file():
        raise DataError(
            f"{data}: is neither a folder of prepared data nor a file of rows. Give one with --data (what a checkpoint "
            "was trained on is looked for from the folder in which the command is given)."
        )
    part = split or VALID
    return MaskedSource(data, part, open_dataset(data, part).fingerprint)


def read_texts(path: Path, column: str | None, tokenizer: Tokenizer) -> TextRows:
    """The rows of a file that can be used, as tokens. DataError if there is none."""
    source = InputRows([str(path)], InputOptions(column=column), tokenizer.domain, added=())
    tokens, lengths, read_rows, failed = [], [], 0, 0
    reasons: list[str] = []
    for records in source.chunks(_CHUNK):
        encoded = encode_texts(tokenizer, [source.text(record) for record in records], max_tokens=1 << 40)
        tokens.append(encoded.tokens)
        lengths.append(encoded.lengths)
        read_rows, failed = read_rows + len(records), failed + len(encoded.failures)
        reasons += [
            f"row {records[index].row}: {records[index].problem or reason}"
            for index, reason in encoded.failures.items()
        ][: LISTED - len(reasons)]
    if failed == read_rows:
        raise DataError(source.none_usable(read_rows, reasons[0] if reasons else ""))
    return TextRows(np.concatenate(tokens), np.concatenate(lengths), read_rows, failed, reasons)


def longest_sequence(models: Sequence[tuple[RunConfig, Sequence[tuple[float, int]]]]) -> int:
    """The most tokens of a sequence, BOS and EOS not counted, that models of all the settings take, each at all its
    points (ratio, copies); 0 if there is none."""

    def fits(length: int) -> bool:
        return all(
            longest_expansion(
                copies * length + 2, ratio=ratio, states=config.model.states, anchors=config.model.anchors
            )
            <= config.model.max_positions
            for config, points in models
            for ratio, copies in points
        )

    most = min(config.model.max_positions for config, _ in models)
    return next((length for length in range(most, 0, -1) if fits(length)), 0)


def choose_samples(dataset: Dataset, longest: int, count: int) -> tuple[np.ndarray, int]:
    """(ids of the first `count` sequences of at most `longest` tokens, how many longer ones lie before the last of
    them). DataError if there is none."""
    found: list[int] = []
    for first in range(0, len(dataset), _LOOKED_AT):
        lengths = dataset.lengths[first : first + _LOOKED_AT]
        found += (first + np.flatnonzero((lengths <= longest) & (lengths > 0))).tolist()
        if len(found) >= count:
            break
    fitting = np.array(found[:count], np.int64)
    if not len(fitting):
        raise DataError(
            f"no sequence has at most {longest} tokens, which is what all checkpoints take at all ratios: mask less "
            "(--ratios), or leave out the checkpoint with the smallest model.max_positions."
        )
    return fitting, int(fitting[-1]) + 1 - len(fitting)


def described_rows(dataset: Dataset) -> dict[str, Any]:
    """What is recorded of rows that could not be used."""
    if not isinstance(dataset, TextRows):
        return {}
    return {"rows": {"read": dataset.read_rows, "failed": dataset.failed}, "reasons": dataset.reasons}
