"""From the records of foreign shards to token ids, the same at the index and at every later reading.

A record is a run of bytes in a tar: a whole member, or a line of it. Text longer than a sequence makes several
sequences, each a range of its words, so that only these are tokenized when it is read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exlm_dist.data.random_smiles import RandomSmiles, drawn_form, random_forms
from exlm_dist.data.sample_text import FORMS, Unusable, record_value
from exlm_dist.tokenizers import Tokenizer, load_tokenizer
from exlm_dist.tokenizers.encoding import normalised
from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL, UNK
from exlm_dist.utils.errors import DataError

#: A sequence of a foreign shard: its bytes in the tar, their crc32, its number of tokens; which words (or tokens) of
#: the record they are (stop 0: all), which line of an unzipped member, how it is decoded. Of a RANDOM SMILES start is
#: the number of the form, stop how many draws were not used.
RECORD_DTYPE = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("length", "<u4"), ("start", "<u4"), ("stop", "<u4")]
    + [("line", "<u4"), ("form", "<u2"), ("flags", "<u2")]
)
ZIPPED, AS_WRITTEN, OF_TOKENS, RANDOM = 1, 2, 4, 8
_WORD, _BOM = re.compile(r"\S+"), "\ufeff"


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence: those of the words or tokens start:stop of its record (stop 0: all), or of a run of bytes
    of it."""

    tokens: np.ndarray  # int64 [length]
    start: int
    stop: int
    flags: int
    first: int = 0  # bytes first:last of the record
    last: int | None = None
    again: tuple[str, ...] = ()  # why random SMILES were drawn again


class RecordEncoder:
    """Records to token ids by one tokenizer; `field`: of JSON objects; `payload`: the most tokens of a sequence without
    BOS and EOS; `random`: the random SMILES that molecules have beside the canonical one."""

    def __init__(self, tokenizer: Tokenizer, field: str, payload: int, random: RandomSmiles):
        self._tokenizer, self._field, self._payload, self._random = tokenizer, field, payload, random
        self._of_molecules = tokenizer.domain == "smiles"

    def pieces(self, content: bytes, form: str, zipped: bool, line: int) -> tuple[str | np.ndarray, list[Piece]]:
        """What is in the record `content` (`record_value`), ready for the tokenizer, and the sequences that it makes.
        Unusable with the reason."""
        value = record_value(content, form, zipped, line, self._field)
        flags = ZIPPED * zipped
        if isinstance(value, np.ndarray):
            return value, self._cut_ids(self._checked(value), flags)
        try:
            ready = normalised(self._tokenizer, value)
            tokens = np.array(self._tokenizer.encode(ready), np.int64)
        except Unusable:
            raise
        except DataError as error:
            raise Unusable(str(error)) from error
        flags |= AS_WRITTEN * (ready == value)
        if len(tokens) <= self._payload:
            return ready, [Piece(tokens, 0, 0, flags), *self._random_pieces(ready, flags)]
        if self._of_molecules:
            raise Unusable(f"too long: {len(tokens) + 2} tokens with BOS and EOS")
        pieces = self._cut_text(ready.split(" "), tokens, flags)
        if form == "text" and not zipped and _BOM not in value[1:] and not pieces[0].flags & OF_TOKENS:
            pieces = _as_bytes(pieces, value, len(content))
        return ready, pieces

    def tokens(self, records: np.ndarray, contents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids int32 [sum of lengths] of the sequences that the index rows `records` [m] describe, one after the
        other, and lengths int64 [m]; `contents`: their bytes. DataError if they are not as many as the index says."""
        values = [
            record_value(content, FORMS[form], bool(flags & ZIPPED), line, self._field)
            for content, form, flags, line in zip(contents, *_columns(records, "form", "flags", "line"))
        ]
        ranges = list(zip(*_columns(records, "start", "stop", "flags")))
        texts = [self._text(value, *which) for value, which in zip(values, ranges) if isinstance(value, str)]
        flat, lengths = self._tokenizer.encode_batch(texts)
        if len(texts) < len(values) or (records["flags"] & OF_TOKENS).any():
            flat, lengths = _chosen(values, ranges, flat, lengths)
        for row in np.flatnonzero(lengths != records["length"]).tolist():
            raise DataError(
                f"the record at byte {records['offset'][row]} gives {lengths[row]} tokens, {records['length'][row]} by "
                "the index: it was made with another version of the tokenizer or of RDKit. Index the shards again."
            )
        return flat.astype(np.int32, copy=False), lengths

    def _text(self, value: str, start: int, stop: int, flags: int) -> str:
        """The words start:stop of a text, ready for the tokenizer; all of it where they are ranges of tokens. Of a
        random SMILES the one that was drawn when the index was made."""
        ready = value if flags & AS_WRITTEN else normalised(self._tokenizer, value)
        if flags & RANDOM:
            return drawn_form(ready, seed=self._random.seed, form=start, attempt=stop)
        return " ".join(ready.split(" ")[start:stop]) if stop and not flags & OF_TOKENS else ready

    def _random_pieces(self, smiles: str, flags: int) -> Iterator[Piece]:
        """A piece for each random SMILES of a molecule."""
        if not self._random.count:
            return
        assert isinstance(self._tokenizer, SmilesTokenizer), "random SMILES need a tokenizer of molecules"
        policy = self._tokenizer.policy
        for form, (text, again) in enumerate(random_forms(smiles, policy, self._payload, self._random), 1):
            ids = np.array(self._tokenizer.encode(text), np.int64)
            yield Piece(ids, form, len(again), flags | RANDOM, again=again)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) == 0:
            raise Unusable("empty")
        if ids.min() < 0 or ids.max() >= self._tokenizer.vocab_size:
            raise Unusable(f"foreign ids: {ids.min()} to {ids.max()}, vocabulary {self._tokenizer.vocab_size}")
        if np.any((ids < NUM_SPECIAL) & (ids != UNK)):
            raise Unusable("special ids: BOS, EOS, PAD or MASK among them")
        return ids

    def _cut_ids(self, ids: np.ndarray, flags: int) -> list[Piece]:
        if len(ids) <= self._payload:
            return [Piece(ids, 0, 0, flags)]
        if self._of_molecules:
            raise Unusable(f"too long: {len(ids) + 2} tokens with BOS and EOS")
        return [
            Piece(ids[first : first + self._payload], first, min(first + self._payload, len(ids)), flags | OF_TOKENS)
            for first in range(0, len(ids), self._payload)
        ]

    def _cut_text(self, words: list[str], tokens: np.ndarray, flags: int) -> list[Piece]:
        """Pieces that start at words, as many words each as fit. By tokens instead if the tokens of the words are not
        those of the whole, or a word alone is too long."""
        counts = self._tokenizer.encode_batch(words)[1].tolist()
        if sum(counts) != len(tokens) or max(counts) > self._payload:
            return self._cut_ids(tokens, flags)
        pieces: list[Piece] = []
        first = size = done = 0
        for number, count in enumerate([*counts, self._payload + 1]):
            if size + count > self._payload:
                own = np.array(self._tokenizer.encode(" ".join(words[first:number])), np.int64)
                if not np.array_equal(own, tokens[done : done + size]):
                    return self._cut_ids(tokens, flags)
                pieces.append(Piece(own, first, number, flags))
                first, done, size = number, done + size, 0
            size += count
        return pieces


def _chosen(
    values: list[str | np.ndarray], ranges: list[tuple[int, int, int]], flat: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What `RecordEncoder.tokens` returns where some `values` are ids, or some sequences ranges of tokens; `flat` and
    `lengths`: of those that are texts."""
    encoded = iter(np.split(flat, np.cumsum(lengths)[:-1]))
    found = [next(encoded) if isinstance(value, str) else value for value in values]
    found = [ids[start:stop] if stop and flags & OF_TOKENS else ids for ids, (start, stop, flags) in zip(found, ranges)]
    return np.concatenate(found), np.array([len(ids) for ids in found], np.int64)


def forms_in(records: np.ndarray) -> np.ndarray:
    """uint32 [n]: which form of its molecule each of n index rows is; 0: the canonical one, or text."""
    return np.where(records["flags"] & RANDOM, records["start"], 0)


def _as_bytes(pieces: list[Piece], text: str, size: int) -> list[Piece]:
    """The same pieces as runs of the bytes of plain `text`, which `size` bytes hold: a book is not read for a page."""
    spans = [match.span() for match in _WORD.finditer(text)]
    found, position, place = [], size - len(text.encode()), 0  # what comes before the text is a byte order mark
    for piece in pieces:
        start, stop = spans[piece.start][0], spans[piece.stop - 1][1]
        first = position + len(text[place:start].encode())
        last = first + len(text[start:stop].encode())
        whole = " ".join(text[start:stop].split()) == text[start:stop]
        found.append(Piece(piece.tokens, 0, 0, piece.flags & ~AS_WRITTEN | AS_WRITTEN * whole, first, last))
        position, place = last, stop
    return found


def _columns(records: np.ndarray, *names: str) -> list[list[int]]:
    return [records[name].tolist() for name in names]


@functools.lru_cache(maxsize=2)
def encoder_of(folder: str, field: str, payload: int, random: RandomSmiles) -> RecordEncoder:
    """The encoder with the tokenizer saved in `folder`, for worker processes, which keep it."""
    return RecordEncoder(load_tokenizer(Path(folder)), field, payload, random)
