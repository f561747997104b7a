"""Texts or molecules as people have them to token ids, with the reason for each that cannot be used. No torch here.

The one way in for a trained model: molecules pass through the canonicalisation policy saved with the tokenizer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer
from exlm_dist.tokenizers.tokenizer import UNK, Tokenizer
from exlm_dist.utils.errors import DataError


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of the m texts that can be used, without BOS and EOS, one text after another."""

    tokens: np.ndarray  # int32 [sum of lengths]
    lengths: np.ndarray  # int64 [m]
    rows: np.ndarray  # int64 [m] index of each in what was given
    failures: dict[int, str] = field(default_factory=dict)  # index in what was given -> why it cannot be used
    unknown: int = 0  # texts with a token that the vocabulary lacks (it is read as `<unk>`)
    truncated: int = 0  # texts of which the end was cut off


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str | None], *, max_tokens: int, truncate: bool = False
) -> EncodedTexts:
    """Encode `texts`; those with more than `max_tokens` tokens fail, or with `truncate` lose their end.

    A text that is empty or None, not UTF-8 or (for a SMILES tokenizer) no molecule fails with the reason.
    """
    failures: dict[int, str] = {}
    kept: list[Sequence[int]] = []
    rows: list[int] = []
    unknown = truncated = 0
    for row, text in enumerate(texts):
        try:
            ids: Sequence[int] = tokenizer.encode(normalised(tokenizer, text))
        except DataError as error:
            failures[row] = str(error)
            continue
        if len(ids) > max_tokens:
            if not truncate:
                failures[row] = f"{len(ids)} tokens, but the model takes {max_tokens} at most"
                continue
            ids, truncated = ids[:max_tokens], truncated + 1
        unknown += UNK in ids
        kept.append(ids)
        rows.append(row)
    lengths = np.array([len(ids) for ids in kept], np.int64)
    tokens = np.fromiter(chain.from_iterable(kept), np.int32, lengths.sum())
    return EncodedTexts(tokens, lengths, np.array(rows, np.int64), failures, unknown, truncated)


def encode_as_saved(folder: str, texts: Sequence[str | None], *, max_tokens: int, truncate: bool) -> EncodedTexts:
    """`encode_texts` with the tokenizer saved in `folder`, for worker processes: without torch they start at once."""
    return encode_texts(_tokenizer(folder), texts, max_tokens=max_tokens, truncate=truncate)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    return load_tokenizer(folder)


def normalised(tokenizer: Tokenizer, text: str | None) -> str:
    """The text as the tokenizer reads it, made as `exlm prepare` makes those that a model learns from; DataError, whose
    message is the reason alone, if it cannot be used."""
    if text is None or not text.strip():
        raise DataError("empty")
    if not _is_utf8(text):
        raise DataError("not UTF-8")
    if isinstance(tokenizer, SmilesTokenizer):
        from exlm_dist.tokenizers.molecules import canonical_smiles, smiles_in

        return canonical_smiles(smiles_in(text), tokenizer.policy)
    return " ".join(text.split())


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
