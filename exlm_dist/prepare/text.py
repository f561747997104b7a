"""`prepare_text`: text to shards: documents, sentencepiece, blocks of bounded length without losing a word."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from exlm_dist.data.manifest import QUARANTINE, TOKENIZER
from exlm_dist.prepare.documents import Documents
from exlm_dist.prepare.folder import (
    VALID_FRACTION,
    Source,
    SplitWriter,
    check_fraction,
    check_max_length,
    check_out,
    choose_valid,
    chunked,
    find_sources,
    prepare_folder,
    request_for,
    save_tokenizer,
)
from exlm_dist.prepare.summary import Summary
from exlm_dist.prepare.tally import MAX_REJECTED, Tally, check_max_rejected
from exlm_dist.tables.input_files import InputOptions
from exlm_dist.tokenizers import Tokenizer, load_tokenizer
from exlm_dist.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, VocabularyTooLarge
from exlm_dist.utils.cores import available_cores
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import content_hash
from exlm_dist.utils.outputs import check_space, user_path
from exlm_dist.utils.progress import Progress
from exlm_dist.utils.workers import ordered_map

CHARACTERS_PER_TASK = 200_000
BLOCKS_PER_WRITE = 8192
#: What the manifest says about how text becomes sequences.
POLICY = {
    "whitespace": "runs become one space",
    "normalization": "none",
    "documents": "joined in order, cut at word starts",
}


def prepare_text(
    inputs: Sequence[str] | Source,
    out: Path | str,
    *,
    vocab_size: int = 32_000,
    column: str | None = None,
    format: str | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
    max_length: int = 512,
    valid_inputs: Sequence[str] = (),
    valid_fraction: float = VALID_FRACTION,
    model_type: str = "unigram",
    sample_bytes: int = 50_000_000,
    max_rejected: float = MAX_REJECTED,
    workers: int | None = None,
    tokenizer: Path | str | None = None,
    overwrite: bool = False,
) -> Summary:
    """Prepare the text of `inputs` (paths and patterns, or any source of rows) as the folder `out`.

    Documents are separated by blank lines in txt files and are one per row elsewhere; they are joined in order and cut,
    at word starts, into blocks of at most max_length tokens with BOS and EOS. vocab_size, model_type ('unigram' or
    'bpe'), sample_bytes: of the sentencepiece model trained here (a text with too few pieces for vocab_size gets the
    largest vocabulary that it fills, and the summary says so); or `tokenizer`: a folder with a text tokenizer, or a
    sentencepiece `.model` file. The rest as in `prepare_smiles`.
    """
    check_fraction(valid_fraction)
    check_max_length(max_length)
    check_max_rejected(max_rejected)
    out = user_path(out)
    check_out(out, overwrite)
    asked = InputOptions(column, format, delimiter, header)
    train, valid = find_sources(inputs, valid_inputs, asked, "text")
    if model_type not in ("unigram", "bpe"):
        raise DataError(f"model_type = {model_type!r}: must be one of unigram, bpe.")
    given = None if tokenizer is None else _given_tokenizer(user_path(tokenizer))
    workers = workers or available_cores()
    job = TextJob(
        train, valid, given, vocab_size, model_type, sample_bytes, max_length, valid_fraction, max_rejected, workers
    )
    settings = {
        **asked.given(),
        "max_length": max_length,
        "valid_fraction": None if valid else valid_fraction,
        "vocab_size": None if given else vocab_size,
        "model_type": None if given else model_type,
        "sample_bytes": None if given else sample_bytes,
        "tokenizer": given and given.fingerprint,
    }
    return prepare_folder(out, request_for("text", train, valid, settings), overwrite, job.run)


def _given_tokenizer(path: Path) -> SentencePieceTokenizer:
    """The tokenizer in a folder, or that of a sentencepiece `.model` file. DataError for one of another domain."""
    if path.is_file():
        return SentencePieceTokenizer.from_model_file(path)
    tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise DataError(f"{path}: a {tokenizer.domain} tokenizer; text needs a sentencepiece one.")
    return tokenizer


@dataclass(frozen=True)
class TextJob:
    """The preparation of one folder: `run` fills the staged folder and returns the manifest's content."""

    train: Source
    valid: Source | None
    tokenizer: SentencePieceTokenizer | None
    vocab_size: int
    model_type: str
    sample_bytes: int
    max_length: int
    valid_fraction: float
    max_rejected: float
    workers: int

    def run(self, folder: Path) -> dict[str, Any]:
        files = [path for source in (self.train, self.valid) if source for path in source.of_lines]
        check_space(folder, sum(os.path.getsize(path) for path in files), "the text of the input alone")
        with (
            TemporaryDirectory(prefix="spool.", dir=folder) as spool,
            Tally(folder / QUARANTINE, self.max_rejected) as tally,
        ):
            documents = [Documents(Path(spool) / name) for name in ("train.txt", "valid.txt")]
            for part, source in zip(documents, (self.train, self.valid)):
                if source is not None:
                    part.write(source, tally)
            documents[0].refuse_molecules()
            tokenizer = self.tokenizer or self._train_tokenizer(documents[0])
            described = save_tokenizer(tokenizer, folder)
            blocks = _Blocks(Path(spool) / "blocks.bin", tokenizer.is_byte)
            held_out = self._cut(documents, tokenizer, folder, blocks)
            splits = self._write(blocks, held_out, tokenizer, folder)
            blocks.check_sum(splits)
        words = sum(part.words for part in documents)
        statistics = {
            "unit": "rows",
            "documents": sum(part.count for part in documents),
            "words": words,
            "byte_tokens": blocks.byte_tokens,
            "vocab_size_asked": None if self.tokenizer else self.vocab_size,
            **tally.statistics(tally.kept),
        }
        return {
            "domain": "text",
            "vocab_size": tokenizer.vocab_size,
            "max_length": self.max_length,
            "policy": POLICY,
            "tokenizer": described,
            "splits": splits,
            "statistics": statistics,
        }

    def _train_tokenizer(self, documents: Documents) -> SentencePieceTokenizer:
        """Of the size that was asked for, or of the largest that a smaller text fills: the summary says so."""

        def train(vocab_size: int) -> SentencePieceTokenizer:
            return SentencePieceTokenizer.train(documents.sentences(self.sample_bytes), vocab_size, self.model_type)

        try:
            return train(self.vocab_size)
        except VocabularyTooLarge as error:
            return train(error.most)

    def _cut(
        self, documents: list[Documents], tokenizer: SentencePieceTokenizer, folder: Path, blocks: _Blocks
    ) -> np.ndarray:
        """Encode the documents and cut them into `blocks`; returns which are held-out ones, bool [m]."""
        encode = partial(encode_documents, str(folder / TOKENIZER))
        counts = []
        for part in documents:
            if part.count:
                cutter = BlockCutter(self.max_length - 2, tokenizer.starts_word)
                with blocks, Progress("tokens", "tokens") as progress:
                    for tokens in ordered_map(encode, chunked(part.read(), CHARACTERS_PER_TASK, len), self.workers):
                        blocks.count(tokens)
                        blocks.add(*cutter.feed(tokens))
                        progress.update(len(tokens))
                    blocks.add(*cutter.finish())
            counts.append(len(blocks.lengths))
        if self.valid is not None:
            return np.arange(counts[1]) >= counts[0]
        return choose_valid(np.frombuffer(blocks.hashes, dtype=np.uint64), self.valid_fraction)

    def _write(self, blocks: _Blocks, held_out: np.ndarray, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
        with (
            SplitWriter(folder, tokenizer.vocab_size, self.max_length) as writer,
            Progress("shards", "blocks", len(held_out)) as progress,
        ):
            first = 0
            for tokens, lengths in blocks.read():
                writer.write(tokens, lengths, held_out[first : first + len(lengths)])
                first += len(lengths)
                progress.update(len(lengths))
            return writer.close()


class BlockCutter:
    """Cuts a stream of ids into blocks of at most `payload` ids; every id ends up in exactly one block, in order.

    A block ends before the start of a word, unless that one word is longer than a block.
    """

    def __init__(self, payload: int, starts_word: np.ndarray):
        self._payload, self._starts_word = payload, starts_word
        self._rest = np.empty(0, dtype=np.int32)

    def feed(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks that these ids complete: (tokens [sum of lengths], lengths int64 [m])."""
        buffer = np.concatenate([self._rest, tokens]).astype(np.int32, copy=False)
        starts = np.flatnonzero(self._starts_word[buffer])
        edges = [0]
        while len(buffer) - edges[-1] > self._payload:
            limit = edges[-1] + self._payload
            index = int(np.searchsorted(starts, limit, side="right")) - 1
            edges.append(int(starts[index]) if index >= 0 and starts[index] > edges[-1] else limit)
        self._rest = buffer[edges[-1] :]
        return buffer[: edges[-1]], np.diff(edges)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The last block, if anything is left."""
        rest, self._rest = self._rest, self._rest[:0]
        return rest, np.array([len(rest)] if len(rest) else [], dtype=np.int64)


class _Blocks:
    """The blocks in order in a file, and their lengths and hashes; `add` works inside `with`."""

    def __init__(self, path: Path, is_byte: np.ndarray):
        self._path, self._is_byte = path, is_byte
        self.lengths, self.hashes = array("q"), array("Q")
        self.byte_tokens = self.tokens_in = 0

    def __enter__(self) -> _Blocks:
        self._file = open(self._path, "ab")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def count(self, tokens: np.ndarray) -> None:
        """Count `tokens` before they are cut into blocks."""
        self.tokens_in += len(tokens)
        self.byte_tokens += int(np.count_nonzero(self._is_byte[tokens]))

    def check_sum(self, splits: dict[str, Any]) -> None:
        """RuntimeError if not every token of the documents is in a shard."""
        tokens = sum(part["tokens"] for part in splits.values())
        if tokens != self.tokens_in:
            raise RuntimeError(f"{self.tokens_in} tokens of documents, but {tokens} in shards")

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        content = memoryview(tokens.astype("<i4", copy=False).tobytes())
        offset = 0
        for length in lengths.tolist():
            self.hashes.append(content_hash(content[offset : offset + 4 * length]))
            offset += 4 * length
        self.lengths.extend(lengths.tolist())
        self._file.write(content)

    def read(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        lengths = np.frombuffer(self.lengths, dtype=np.int64)
        with open(self._path, "rb") as file:
            for first in range(0, len(lengths), BLOCKS_PER_WRITE):
                part = lengths[first : first + BLOCKS_PER_WRITE]
                yield np.fromfile(file, dtype="<i4", count=int(part.sum())), part


def encode_documents(folder: str, documents: list[str]) -> np.ndarray:
    """Ids of the documents by the tokenizer saved in `folder`, joined."""
    return _loaded(folder).encode_batch(documents)[0]


@lru_cache(maxsize=1)
def _loaded(folder: str) -> Tokenizer:
    return load_tokenizer(Path(folder))
