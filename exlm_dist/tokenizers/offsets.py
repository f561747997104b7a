"""Where in a text each of its tokens is, for answers that are parts of a text."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from exlm_dist.tokenizers.sentencepiece_tokenizer import WORD_START
from exlm_dist.tokenizers.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class OffsetEncoder:
    """Encodes texts of words with one space between them, word by word, as sentencepiece itself does but for ties."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._names = tokenizer, tokenizer.tokens()
        self._words: dict[str, tuple[list[int], np.ndarray]] = {}

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], of each the first character and the one behind its last, int64 [n, 2]).

        Of a character of several tokens each has the whole. Where the tokenizer changes a word (say, by NFKC), each of
        its tokens has the whole word.
        """
        ids: list[int] = []
        spans: list[np.ndarray] = []
        start = 0
        for word in text.split(" "):
            if word not in self._words:
                own = self._tokenizer.encode(word)
                self._words[word] = own, character_spans(word, [self._names[i] for i in own])
            ids += self._words[word][0]
            spans.append(self._words[word][1] + start)
            start += len(word) + 1
        return np.array(ids, np.int32), np.concatenate(spans)


def character_spans(word: str, pieces: Sequence[str]) -> np.ndarray:
    """First character and the one behind the last of each piece of a word, int64 [pieces, 2]; see `OffsetEncoder`."""
    content = [_bytes_of(piece) for piece in pieces]
    if b"".join(content) != word.encode():
        return np.tile(np.array([0, len(word)]), (len(pieces), 1))
    ends = np.cumsum([0, *(len(character.encode()) for character in word)])  # of the characters, in bytes
    last = np.cumsum([len(piece) for piece in content], dtype=np.int64)
    first = last - [len(piece) for piece in content]
    begin = np.searchsorted(ends, first, side="right") - 1
    return np.stack([begin, np.maximum(begin, np.searchsorted(ends, last, side="left"))], axis=1)


def _bytes_of(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(WORD_START, "").encode()
