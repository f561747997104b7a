"""Sentencepiece as a `Tokenizer`: trained here, or any existing model with its ids mapped to ours."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from exlm_dist.tokenizers.sentencepiece_proto import SentencePieceModel
from exlm_dist.tokenizers.tokenizer import BOS, EOS, MASK, NUM_SPECIAL, PAD, SPECIAL_NAMES, TOKENIZER_FILE, UNK
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import fingerprint_of, write_atomic, write_json

MODEL_FILE = "sentencepiece.model"
WORD_START = "\u2581"
#: Threads of the trainer. Fixed, because the last digits of its scores depend on the sums over threads.
TRAINER_THREADS = 4


class VocabularyTooLarge(DataError):
    """The text has fewer pieces than the vocabulary should; `most` is the largest vocabulary that it fills."""

    def __init__(self, vocab_size: int, most: int):
        super().__init__(
            f"vocab_size {vocab_size} is too large for this text: at most {most} fits. Use --vocab-size {most}."
        )
        self.most = most


class SentencePieceTokenizer:
    """See `Tokenizer`. The ordinary pieces of the model keep their order and get the ids from 5 up.

    Control pieces are dropped, so that no text can produce a special id. A model from `train` has our ids already.
    """

    domain = "text"

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        processor = self._processor
        ordinary = [
            i
            for i in range(processor.vocab_size())
            if not (processor.IsControl(i) or processor.IsUnknown(i) or processor.IsUnused(i))
        ]
        self.vocab_size = NUM_SPECIAL + len(ordinary)
        self._ours = np.full(processor.vocab_size(), UNK, dtype=np.int32)
        self._ours[ordinary] = np.arange(NUM_SPECIAL, self.vocab_size, dtype=np.int32)
        self._theirs = [-1] * NUM_SPECIAL + ordinary
        pieces = [processor.IdToPiece(i) for i in ordinary]
        self._names = [*SPECIAL_NAMES, *pieces]
        #: bool [vocab_size]: which ids start a word
        self.starts_word = np.array([False] * NUM_SPECIAL + [piece.startswith(WORD_START) for piece in pieces])
        #: bool [vocab_size]: which ids are a byte of a character that is no piece
        self.is_byte = np.array([False] * NUM_SPECIAL + [processor.IsByte(i) for i in ordinary])
        self._content = {
            "kind": "sentencepiece",
            "special": list(SPECIAL_NAMES),
            "model_sha256": hashlib.sha256(model).hexdigest(),
        }
        self.fingerprint = fingerprint_of(self._content)

    @classmethod
    def train(cls, sentences: Iterable[str], vocab_size: int, model_type: str = "unigram") -> SentencePieceTokenizer:
        """Train on `sentences`; `vocab_size` includes the five special ids and the 256 bytes of the byte fallback.

        model_type: 'unigram' or 'bpe'. VocabularyTooLarge, with the size that fits, or another DataError if the text
        does not suit `vocab_size`.
        """
        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                bos_id=BOS,
                pad_id=PAD,
                eos_id=EOS,
                unk_id=UNK,
                bos_piece=SPECIAL_NAMES[BOS],
                pad_piece=SPECIAL_NAMES[PAD],
                eos_piece=SPECIAL_NAMES[EOS],
                unk_piece=SPECIAL_NAMES[UNK],
                control_symbols=[SPECIAL_NAMES[MASK]],
                byte_fallback=True,
                normalization_rule_name="identity",
                character_coverage=0.9999,
                max_sentence_length=1 << 16,
                num_threads=TRAINER_THREADS,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise _training_problem(str(error), vocab_size) from error
        return cls(model.getvalue())

    @classmethod
    def load(cls, folder: Path) -> SentencePieceTokenizer:
        """Read a saved tokenizer; DataError if the model file is missing or not the one that was saved."""
        path = Path(folder) / MODEL_FILE
        expected = json.loads((Path(folder) / TOKENIZER_FILE).read_text(encoding="utf-8")).get("model_sha256")
        tokenizer = cls.from_model_file(path)
        if tokenizer._content["model_sha256"] != expected:
            raise DataError(
                f"{path}: sha256 {tokenizer._content['model_sha256']}, expected {expected} (damaged or replaced)."
            )
        return tokenizer

    @classmethod
    def from_model_file(cls, path: Path) -> SentencePieceTokenizer:
        """Use a `.model` file that sentencepiece wrote, whatever its ids. DataError if it cannot be read."""
        try:
            return cls(Path(path).read_bytes())
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: not readable as a sentencepiece model ({error}).") from error

    def model(self) -> SentencePieceModel:
        """Content of the model file, in sentencepiece's ids."""
        return SentencePieceModel.parse(self._model)

    def model_ids(self) -> list[int]:
        """Sentencepiece's id of each of our ids; -1 for the special ones."""
        return list(self._theirs)

    def save(self, folder: Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / MODEL_FILE, self._model)
        write_json(folder / TOKENIZER_FILE, self._content)

    def encode(self, text: str) -> list[int]:
        return self._ours[self._processor.encode(text)].tolist() if text else []

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = self._processor.encode(list(texts), num_threads=1)
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        flat = np.fromiter((token for row in rows for token in row), dtype=np.int64, count=int(lengths.sum()))
        return self._ours[flat], lengths

    def decode(self, ids: Sequence[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        for token in map(int, ids):
            if token >= NUM_SPECIAL:
                run.append(self._theirs[token])
            elif token in (UNK, MASK):
                parts += [self._processor.decode(run), SPECIAL_NAMES[token]]
                run = []
        return " ".join(part for part in [*parts, self._processor.decode(run)] if part)

    def tokens(self) -> list[str]:
        return list(self._names)


def _training_problem(message: str, vocab_size: int) -> DataError:
    if limit := re.search(r"Please set it to a value <= (\d+)", message):
        return VocabularyTooLarge(vocab_size, int(limit.group(1)))
    if limit := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        return DataError(
            f"vocab_size {vocab_size} is too small: the characters, bytes and special ids alone need {limit.group(2)}. "
            "Use a larger --vocab-size."
        )
    return DataError(f"sentencepiece cannot be trained on this text with vocab_size {vocab_size}: {message.strip()}")
