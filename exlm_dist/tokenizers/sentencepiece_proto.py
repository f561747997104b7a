"""What a sentencepiece model file says of itself: pieces with scores and types, and how text is normalised.

The file is a protocol buffer (sentencepiece_model.proto). The few fields needed are read here, as the generated module
of the sentencepiece package needs protobuf.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from exlm_dist.utils.errors import DataError

#: Values of SentencePiece.Type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
#: Values of TrainerSpec.ModelType.
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
# Fields of ModelProto, TrainerSpec and NormalizerSpec.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _WHITESPACE_SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_WHITESPACE, _ESCAPE = 2, 3, 4, 5


@dataclass(frozen=True)
class SentencePieceModel:
    """Content of a model file; the switches have sentencepiece's names."""

    pieces: list[tuple[str, float, int]]  # text, score, type; by sentencepiece's id
    model_type: str
    byte_fallback: bool
    treat_whitespace_as_suffix: bool
    precompiled_charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool

    @classmethod
    def parse(cls, content: bytes) -> SentencePieceModel:
        """Read the bytes of a model file; DataError if they are none."""
        try:
            fields = list(_fields(content))
            trainer, normalizer = (
                dict(item for number, value in fields if number == wanted for item in _fields(value))
                for wanted in (_TRAINER, _NORMALIZER)
            )
            return cls(
                pieces=[_piece(value) for number, value in fields if number == _PIECES],
                model_type=MODEL_TYPES[trainer.get(_MODEL_TYPE, 1)],
                byte_fallback=bool(trainer.get(_BYTE_FALLBACK, 0)),
                treat_whitespace_as_suffix=bool(trainer.get(_WHITESPACE_SUFFIX, 0)),
                precompiled_charsmap=normalizer.get(_CHARSMAP, b""),
                add_dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
                remove_extra_whitespaces=bool(normalizer.get(_EXTRA_WHITESPACE, 1)),
                escape_whitespaces=bool(normalizer.get(_ESCAPE, 1)),
            )
        except (IndexError, KeyError, ValueError, TypeError, struct.error) as error:
            raise DataError(f"not a sentencepiece model ({type(error).__name__}: {error}).") from error


def _piece(content: bytes) -> tuple[str, float, int]:
    values = dict(_fields(content))
    score = struct.unpack("<f", values[2])[0] if 2 in values else 0.0
    return values[1].decode(), score, values.get(3, NORMAL)


def _fields(content: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of each field of a message: an int, or the bytes of any other kind."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, position = _varint(content, position)
            yield number, value
            continue
        if kind == 2:
            size, position = _varint(content, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if position + size > len(content):
            raise ValueError("truncated")
        yield number, content[position : position + size]
        position += size


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
