"""Atom-level SMILES tokenizer: one regular expression, a vocabulary from the corpus, plain JSON on disk.

The expression is that of Schwaller et al. (Molecular Transformer, 2019) as used by MolFormer, plus ring closures of
three or more digits, dative bonds and the remaining symbols of the OpenSMILES grammar. A bracket atom is one token.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exlm_dist.tokenizers.tokenizer import MASK, NUM_SPECIAL, SPECIAL_NAMES, TOKENIZER_FILE, UNK
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import fingerprint_of, write_json

PATTERN = r"\[[^\[\]]+\]|Br|Cl|->|<-|%\(\d{1,5}\)|%\d\d|[BCNOPSFIbcnops]|[()\.=#\-+\\/:~@?>*$]|\d"
_TOKENS = re.compile(PATTERN, re.ASCII)
#: Tokens of one character.
_SINGLE = [character for character in map(chr, range(128)) if _TOKENS.fullmatch(character)]
_END_OF_LINE, _NO_TOKEN = -1, -2
#: Characters below which `_ids_of_lines` takes longer than the expression.
_FEW = 400


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
        #: By character, of the tokens of one.
        self._single = np.full(128, _NO_TOKEN, np.int32)
        self._single[[ord(character) for character in _SINGLE]] = [self._ids.get(one, UNK) for one in _SINGLE]
        self._single[ord("\n")] = _END_OF_LINE
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
        whole = "\n".join(texts)
        ids = self._ids_of_lines(whole) if len(whole) >= _FEW else None
        ends = None if ids is None else np.flatnonzero(ids == _END_OF_LINE)
        if ids is None or ends is None or len(ends) != len(texts) - 1:
            rows = [self.encode(text) for text in texts]  # raises the error of the first that is wrong, if one is
            flat = [token for row in rows for token in row]
            return np.array(flat, dtype=np.int32), np.array([len(row) for row in rows], dtype=np.int64)
        lengths = np.diff(ends, prepend=-1, append=len(ids)) - 1
        return np.delete(ids, ends), lengths.astype(np.int64)

    def _ids_of_lines(self, lines: str) -> np.ndarray | None:
        """The tokens that the expression finds in `lines`, and `_END_OF_LINE` between these, all at once; None where
        there are rare tokens (`->`, `<-`, `%(123)`), characters of none, or brackets that are not pairs."""
        if not lines.isascii():
            return None
        text = np.frombuffer(lines.encode("ascii"), np.uint8)
        ids = self._single[text]
        get = self._ids.get
        opening, closing = np.flatnonzero(text == ord("[")), np.flatnonzero(text == ord("]"))
        if len(opening) != len(closing) or (closing < opening + 2).any() or (opening[1:] < closing[:-1]).any():
            return None
        atoms = [lines[first : last + 1] for first, last in zip(opening.tolist(), closing.tolist())]
        if any("\n" in atom for atom in atoms):
            return None
        ids[opening] = [get(atom, UNK) for atom in atoms]
        edges = np.zeros(len(text) + 1, np.int8)
        edges[opening + 1], edges[closing + 1] = 1, -1
        rest = np.cumsum(edges[:-1], dtype=np.int8).view(bool)  # characters after the first of their token
        for first, second in ("Cl", "Br"):
            found = np.flatnonzero((text == ord(second)) & ~rest)
            found = found[(found > 0) & (text[found - 1] == ord(first))]
            ids[found - 1] = get(first + second, UNK)
            rest[found] = True
        rings = np.flatnonzero((text == ord("%")) & ~rest)  # %12
        if len(rings):
            if rings[-1] + 2 >= len(text) or not (_is_digit(text[rings + 1]) & _is_digit(text[rings + 2])).all():
                return None
            ids[rings] = [get(lines[first : first + 3], UNK) for first in rings.tolist()]
            rest[rings + 1] = rest[rings + 2] = True
        if ((text[:-1] == ord("-")) & (text[1:] == ord(">")) & ~rest[:-1]).any():
            return None
        ids = ids[~rest]
        return None if (ids == _NO_TOKEN).any() else ids

    def decode(self, ids: Sequence[int]) -> str:
        names = self.tokens()
        return "".join(names[token] for token in map(int, ids) if token >= NUM_SPECIAL or token in (UNK, MASK))

    def tokens(self) -> list[str]:
        return [*SPECIAL_NAMES, *self.vocabulary]


def _is_digit(characters: np.ndarray) -> np.ndarray:
    return (characters >= ord("0")) & (characters <= ord("9"))
