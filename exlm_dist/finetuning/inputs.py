"""Texts, molecules and pairs of texts to token ids for a fine-tuned model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from exlm_dist.tokenizers import Tokenizer
from exlm_dist.tokenizers.encoding import EncodedTexts, encode_texts
from exlm_dist.tokenizers.tokenizer import EOS, UNK
from exlm_dist.utils.errors import ConfigError

Column = Sequence[str | None]


def encode_inputs(
    tokenizer: Tokenizer, columns: Sequence[Column], *, max_tokens: int, truncate: bool = False
) -> EncodedTexts:
    """Encode rows of one column of texts, or of two: a pair (a, b) becomes `BOS a EOS b EOS`, as in an export for the
    transformers library. A row with more than `max_tokens` tokens fails, or with `truncate` loses the end of its
    text, of a pair that of the longer one first."""
    if len(columns) == 1:
        return encode_texts(tokenizer, columns[0], max_tokens=max_tokens, truncate=truncate)
    first, second = (encode_texts(tokenizer, column, max_tokens=1 << 40) for column in columns)
    sides = [
        dict(zip(side.rows.tolist(), np.split(side.tokens, np.cumsum(side.lengths)[:-1]))) for side in (first, second)
    ]
    failures = {**second.failures, **first.failures}
    kept: dict[int, np.ndarray] = {}
    truncated = 0
    for row in sorted(sides[0].keys() & sides[1].keys()):
        a, b = sides[0][row], sides[1][row]
        if len(a) + 1 + len(b) > max_tokens:
            if not truncate:
                failures[row] = f"{len(a) + 1 + len(b)} tokens, but the model takes {max_tokens} at most"
                continue
            a, b = _cut(a, b, max_tokens - 1)
            truncated += 1
        kept[row] = np.concatenate([a, [EOS], b]).astype(np.int32)
    pairs = list(kept.values())
    return EncodedTexts(
        np.concatenate(pairs) if pairs else np.zeros(0, np.int32),
        np.array([len(pair) for pair in pairs], np.int64),
        np.array(list(kept), np.int64),
        dict(sorted(failures.items())),
        sum(bool((pair == UNK).any()) for pair in pairs),
        truncated,
    )


def as_columns(rows: Any, names: Sequence[str]) -> list[list[str | None]]:
    """The columns of texts in what a user passes: a list (array, Series) of texts, for two columns of pairs, or a
    DataFrame with columns of these `names`. ConfigError for anything else."""
    if hasattr(rows, "columns"):
        missing = [name for name in names if name not in rows.columns]
        if missing:
            raise ConfigError(f"the DataFrame has no column {missing[0]!r}; its columns: {list(rows.columns)}.")
        return [[_text(value) for value in rows[name].tolist()] for name in names]
    if isinstance(rows, str):
        raise ConfigError("one text where a list of them is expected: write [text].")
    values = rows.tolist() if hasattr(rows, "tolist") else list(rows)
    if len(names) == 1:
        pairs = next((value for value in values if isinstance(value, (list, tuple))), None)
        if pairs is not None and len(pairs) != 1:
            raise ConfigError(f"the model reads one text for each row, not {len(pairs)}: {pairs!r}.")
        return [[_text(value[0] if isinstance(value, (list, tuple)) else value) for value in values]]
    wrong = next((value for value in values if not isinstance(value, (list, tuple)) or len(value) != 2), None)
    if wrong is not None:
        raise ConfigError(f"the model reads pairs of texts ({' and '.join(names)}), not {wrong!r}.")
    return [[_text(value[side]) for value in values] for side in (0, 1)]


def _text(value: Any) -> str | None:
    """A cell as text; None, NaN and what is no text at all are missing."""
    return value if isinstance(value, str) else None


def _cut(a: np.ndarray, b: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The beginnings of two texts that have `room` tokens in all; the shorter one loses nothing before the other is as
    short."""
    half = room // 2
    if len(b) <= half:
        return a[: room - len(b)], b
    if len(a) <= half:
        return a, b[: room - len(a)]
    return a[: room - half], b[:half]
