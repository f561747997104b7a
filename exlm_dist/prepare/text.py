"""`prepare_text`: text to shards: documents, sentencepiece, blocks of bounded length without losing a word."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from exlm_dist.data.manifest import QUARANTINE, TOKENIZER
from exlm_dist.prepare.folder import (
    VALID_FRACTION,
    Quarantine,
    Source,
    SplitWriter,
    check_fraction,
    check_max_length,
    choose_valid,
    chunked,
    content_hash,
    find_sources,
    prepare_folder,
    request_for,
    save_tokenizer,
)
from exlm_dist.prepare.summary import Summary
from exlm_dist.tables.input_files import InputOptions
from exlm_dist.tokenizers import Tokenizer, load_tokenizer
from exlm_dist.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from exlm_dist.tokenizers.smiles_tokenizer import split_smiles
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.progress import Progress
from exlm_dist.utils.workers import default_workers, ordered_map

CHARACTERS_PER_TASK = 200_000
BLOCKS_PER_WRITE = 8192
SENTENCE_CHARACTERS = 1000
#: What the manifest says about how text becomes sequences.
POLICY = {
    "whitespace": "runs become one space",
    "normalization": "none",
    "documents": "joined in order, cut at word starts",
}
#: An input is refused as molecules if of so many first words more than this fraction parse as SMILES.
FIRST_WORDS, LIKE_SMILES = 2000, 0.9


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
    workers: int | None = None,
    tokenizer: Path | str | None = None,
    overwrite: bool = False,
) -> Summary:
    """Prepare the text of `inputs` (paths and patterns, or any source of rows) as the folder `out`.

    Documents are separated by blank lines in txt files and are one per row elsewhere; they are joined in order and cut,
    at word starts, into blocks of at most max_length tokens with BOS and EOS. vocab_size, model_type ('unigram' or
    'bpe'), sample_bytes: of the sentencepiece model trained here; or `tokenizer`: a folder with a text tokenizer, or a
    sentencepiece `.model` file. The rest as in `prepare_smiles`.
    """
    check_fraction(valid_fraction)
    check_max_length(max_length)
    asked = InputOptions(column, format, delimiter, header)
    train, valid = find_sources(inputs, valid_inputs, asked, "text")
    if model_type not in ("unigram", "bpe"):
        raise DataError(f"model_type = {model_type!r}: must be one of unigram, bpe.")
    given = None if tokenizer is None else _given_tokenizer(Path(tokenizer))
    workers = workers or default_workers()
    job = TextJob(train, valid, given, vocab_size, model_type, sample_bytes, max_length, valid_fraction, workers)
    settings = {
        **asked.given(),
        "max_length": max_length,
        "valid_fraction": None if valid else valid_fraction,
        "vocab_size": None if given else vocab_size,
        "model_type": None if given else model_type,
        "sample_bytes": None if given else sample_bytes,
        "tokenizer": given and given.fingerprint,
    }
    return prepare_folder(Path(out), request_for("text", train, valid, settings), overwrite, job.run)


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
    workers: int

    def run(self, folder: Path) -> dict[str, Any]:
        with TemporaryDirectory(prefix="spool.", dir=folder) as spool, Quarantine(folder / QUARANTINE) as quarantine:
            documents = [_Documents(Path(spool) / name) for name in ("train.txt", "valid.txt")]
            for part, source in zip(documents, (self.train, self.valid)):
                if source is not None:
                    part.write(source, quarantine)
            documents[0].refuse_molecules()
            tokenizer = self.tokenizer or SentencePieceTokenizer.train(
                documents[0].sentences(self.sample_bytes), self.vocab_size, self.model_type
            )
            described = save_tokenizer(tokenizer, folder)
            blocks = _Blocks(Path(spool) / "blocks.bin")
            held_out = self._cut(documents, tokenizer, folder, blocks)
            splits = self._write(blocks, held_out, tokenizer, folder)
        statistics = {
            "unit": "documents",
            "rows": sum(part.count for part in documents),
            "duplicates": 0,
            "words": sum(part.words for part in documents),
            "quarantined": dict(quarantine.counts),
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

    def _cut(
        self, documents: list[_Documents], tokenizer: SentencePieceTokenizer, folder: Path, blocks: _Blocks
    ) -> np.ndarray:
        """Encode the documents and cut them into `blocks`; returns which are held-out ones, bool [m]."""
        encode = partial(encode_documents, str(folder / TOKENIZER))
        counts = []
        for part in documents:
            if part.count:
                cutter = BlockCutter(self.max_length - 2, tokenizer.starts_word)
                with blocks, Progress("tokens", "tokens") as progress:
                    for tokens in ordered_map(encode, chunked(part.read(), CHARACTERS_PER_TASK, len), self.workers):
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


class _Documents:
    """Documents of one source, one per line of a file, with each run of white space made one space."""

    def __init__(self, path: Path):
        self._path = path
        self.count = self.words = self.characters = 0

    def write(self, source: Source, quarantine: Quarantine) -> None:
        """Write all documents of the source; DataError if there is no word in them."""
        with (
            open(self._path, "w", encoding="utf-8", newline="\n") as file,
            Progress("documents", "documents") as progress,
        ):
            for text in read_documents(source, quarantine):
                words = text.split()
                text = " ".join(words)
                file.write(text + "\n")
                self.count += 1
                self.words += len(words)
                self.characters += len(text)
                progress.update(1)
        if not self.words:
            names = ", ".join(str(item["name"]) for item in source.identity[:5])
            why = "the input is empty, or is this the right column (--column)?"
            if quarantine.first:
                row, reason = next(iter(quarantine.first.values()))
                aside = sum(quarantine.counts.values())
                why = f"{aside:,} rows cannot be used, first {row.file}, row {row.row}: {reason} ({row.text[:80]!r})."
            raise DataError(f"no words in {names}: {why}")

    def read(self) -> Iterator[str]:
        if not self.count:
            return
        with open(self._path, encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line[:-1]

    def sentences(self, sample_bytes: int) -> Iterator[str]:
        """About `sample_bytes` of the text, chosen by hash, in pieces of `SENTENCE_CHARACTERS` or up to a word more."""
        limit = int(min(1.0, sample_bytes / max(self.characters, 1)) * 2**64)
        for document in self.read():
            for words in chunked(document.split(" "), SENTENCE_CHARACTERS, lambda word: len(word) + 1):
                sentence = " ".join(words)
                if content_hash(sentence.encode()) < limit:
                    yield sentence

    def refuse_molecules(self) -> None:
        """DataError if nearly all of the first words are SMILES."""
        words: list[str] = []
        for document in self.read():
            words += document.split(" ")[: FIRST_WORDS - len(words)]
            if len(words) >= FIRST_WORDS:
                break
        matches = sum(len(word) > 4 and split_smiles(word) is not None for word in words)
        if matches > LIKE_SMILES * len(words):
            raise DataError(
                f"{matches} of the first {len(words)} words read as SMILES (first: {words[0][:60]!r}); "
                "molecules are prepared with `exlm prepare smiles`."
            )


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

    def __init__(self, path: Path):
        self._path = path
        self.lengths, self.hashes = array("q"), array("Q")

    def __enter__(self) -> _Blocks:
        self._file = open(self._path, "ab")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

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


def read_documents(source: Source, quarantine: Quarantine) -> Iterator[str]:
    """Documents with at least one word: the lines between blank lines in txt files, single rows elsewhere."""
    lines: list[str] = []
    file = None
    for row in source.rows():
        if row.file != file:
            if lines:
                yield "\n".join(lines)
            lines, file, grouped = [], row.file, row.file in source.of_lines
        if row.problem:
            quarantine.add(row, row.problem)
        elif row.text.strip():
            if grouped:
                lines.append(row.text)
            else:
                yield row.text
        elif not grouped:
            quarantine.add(row, "empty")
        elif lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


def encode_documents(folder: str, documents: list[str]) -> np.ndarray:
    """Ids of the documents by the tokenizer saved in `folder`, joined."""
    return _loaded(folder).encode_batch(documents)[0]


@lru_cache(maxsize=1)
def _loaded(folder: str) -> Tokenizer:
    return load_tokenizer(Path(folder))
