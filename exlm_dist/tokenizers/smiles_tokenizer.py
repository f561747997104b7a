"""Atom-level SMILES tokenizer: one regular expression, a vocabulary from the corpus, plain JSON on disk.

The expression is that of Schwaller et al. (Molecular Transformer, 2019) as used by MolFormer, plus ring closures of
three or more digits, dative bonds and the remaining symbols of the OpenSMILES grammar. A bracket atom is one token.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.tokenizers.tokenizer import MASK, NUM_SPECIAL, SPECIAL_NAMES, TOKENIZER_FILE, UNK
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import fingerprint_of, write_json

PATTERN = r"\[[^\[\]]+\]|Br|Cl|->|<-|%\(\d{1,5}\)|%\d\d|[BCNOPSFIbcnops]|[()\.=#\-+\\/:~@?>*$]|\d"
_TOKENS = re.compile(PATTERN, re.ASCII)
_TOKENS_OF_LINES = re.compile(rf"{PATTERN}|\n", re.ASCII)
_END_OF_LINE = -1


def split_smiles(smiles: str) -> list[str] | None:
    """Tokens whose concatenation is `smiles`; None if any character belongs to no token: none is dropped silently."""
    tokens = _TOKENS.findall(smiles)
    return tokens if sum(map(len, tokens)) == len(smiles) and "".join(tokens) == smiles else None


def vocabulary_from(counts: Mapping[str, int], min_count: int = 1) -> list[str]:
    """Tokens seen at least `min_count` times, most frequent first, ties by spelling."""
    kept = [token for token, count in counts.items() if count >= min_count]
    return sorted(kept, key=lambda token: (-counts[token], token))


class SmilesTokenizer:
    """See `Tokenizer`. `policy`: how the molecules that it was built from were made canonical."""

    domain = "smiles"

    def __init__(self, vocabulary: Sequence[str], policy: Mapping[str, Any]):
        self.vocabulary = list(vocabulary)
        self.policy = dict(policy)
        self.vocab_size = NUM_SPECIAL + len(self.vocabulary)
        self._ids = {token: NUM_SPECIAL + index for index, token in enumerate(self.vocabulary)}
        self._ids_of_lines = {**self._ids, "\n": _END_OF_LINE}
        self._content = {
            "kind": "smiles",
            "pattern": PATTERN,
            "special": list(SPECIAL_NAMES),
            "policy": self.policy,
            "vocabulary": self.vocabulary,
        }
        self.fingerprint = fingerprint_of(self._content)

    @classmethod
    def from_counts(cls, counts: Counter[str], policy: Mapping[str, Any], min_count: int = 1) -> SmilesTokenizer:
        """Tokenizer for the tokens counted in a corpus."""
        return cls(vocabulary_from(counts, min_count), policy)

    @classmethod
    def load(cls, folder: Path) -> SmilesTokenizer:
        """Read `tokenizer.json`; DataError if it was written with another expression or is incomplete."""
        path = Path(folder) / TOKENIZER_FILE
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("pattern") != PATTERN:
            raise DataError(
                f"{path}: written with a token expression other than that of this version. Prepare the data again."
            )
        if missing := {"vocabulary", "policy"} - content.keys():
            raise DataError(f"{path}: lacks {', '.join(sorted(missing))}.")
        return cls(content["vocabulary"], content["policy"])

    def save(self, folder: Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TOKENIZER_FILE, self._content)

    def encode(self, text: str) -> list[int]:
        tokens = split_smiles(text)
        if tokens is None:
            raise DataError(f"{text[:80]!r} does not consist of SMILES tokens.")
        get = self._ids.get
        return [get(token, UNK) for token in tokens]

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        whole = "\n".join(texts)  # one search for all
        tokens = _TOKENS_OF_LINES.findall(whole)
        if tokens.count("\n") != len(texts) - 1 or "".join(tokens) != whole:
            rows = [self.encode(text) for text in texts]  # raises the error of the first that is wrong, if one is
            flat = [token for row in rows for token in row]
            return np.array(flat, dtype=np.int32), np.array([len(row) for row in rows], dtype=np.int64)
        ids = np.fromiter(map(self._ids_of_lines.get, tokens, repeat(UNK)), np.int32, len(tokens))
        ends = np.flatnonzero(ids == _END_OF_LINE)
        lengths = np.diff(ends, prepend=-1, append=len(ids)) - 1
        return np.delete(ids, ends), lengths.astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        names = self.tokens()
        return "".join(names[token] for token in map(int, ids) if token >= NUM_SPECIAL or token in (UNK, MASK))

    def tokens(self) -> list[str]:
        return [*SPECIAL_NAMES, *self.vocabulary]
