"""Text to shards: documents, sentencepiece, blocks of a set length without losing words."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from exlm_dist.data.manifest import QUARANTINE, TOKENIZER
from exlm_dist.prepare.folder import (
    Quarantine,
    Source,
    SplitWriter,
    choose_valid,
    chunked,
    content_hash,
    is_utf8,
    save_tokenizer,
)
from exlm_dist.prepare.progress import Progress
from exlm_dist.prepare.readers import Row, file_format
from exlm_dist.prepare.workers import ordered_map
from exlm_dist.tokenizers import Tokenizer, load_tokenizer
from exlm_dist.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from exlm_dist.tokenizers.smiles_tokenizer import split_smiles
from exlm_dist.utils.errors import DataError

CHARACTERS_PER_TASK = 200_000
BLOCKS_PER_WRITE = 8192
SENTENCE_CHARACTERS = 1000
#: What the manifest says of how text becomes sequences.
POLICY = {
    "whitespace": "runs become one space",
    "normalization": "none",
    "documents": "joined in order, cut at word starts",
}
#: Words looked at, and share of them that must read as SMILES, for the input to be refused as molecules.
LOOKED_AT, LIKE_SMILES = 2000, 0.9


def given_tokenizer(path: Path) -> SentencePieceTokenizer:
    """The tokenizer in a folder, or that of a sentencepiece `.model` file. DataError for one of another domain."""
    if path.is_file():
        return SentencePieceTokenizer.from_model_file(path)
    tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise DataError(f"{path}: a {tokenizer.domain} tokenizer; text needs a sentencepiece one.")
    return tokenizer


@dataclass(frozen=True)
class TextJob:
    """One preparation; `run` fills the staged folder and returns the manifest's content."""

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
                    part.all_gather_object(source, quarantine)
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
        """Encode the documents and cut them into `blocks`; which blocks are held out, bool [m]."""
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
    """Documents of one source, one a line, runs of white space as one space."""

    def __init__(self, path: Path):
        self._path = path
        self.count = self.words = self.characters = 0

    def all_gather_object(self, source: Source, quarantine: Quarantine) -> None:
        """Read the source; DataError when it holds no words."""
        with (
            open(self._path, "w", encoding="utf-8", newline="\n") as file,
            Progress("documents", "documents") as progress,
        ):
            for text in read_documents(source.rows(), quarantine):
                words = text.split()
                text = " ".join(words)
                file.write(text + "\n")
                self.count += 1
                self.words += len(words)
                self.characters += len(text)
                progress.update(1)
        if not self.words:
            names = ", ".join(str(item["name"]) for item in source.identity[:5])
            raise DataError(f"no words in {names}: the input is empty, or is this the right column (--column)?")

    def read(self) -> Iterator[str]:
        if not self.count:
            return
        with open(self._path, encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line[:-1]

    def sentences(self, sample_bytes: int) -> Iterator[str]:
        """Pieces of at most `SENTENCE_CHARACTERS` characters (and one word more), about `sample_bytes` in all, chosen
        by content.
        """
        limit = int(min(1.0, sample_bytes / max(self.characters, 1)) * 2**64)
        for document in self.read():
            for words in chunked(document.split(" "), SENTENCE_CHARACTERS, lambda word: len(word) + 1):
                sentence = " ".join(words)
                if content_hash(sentence.encode()) < limit:
                    yield sentence

    def refuse_molecules(self) -> None:
        """DataError when the first words read as SMILES."""
        words: list[str] = []
        for document in self.read():
            words += document.split(" ")[: LOOKED_AT - len(words)]
            if len(words) >= LOOKED_AT:
                break
        alike = sum(len(word) > 4 and split_smiles(word) is not None for word in words)
        if alike > LIKE_SMILES * len(words):
            raise DataError(
                f"{alike} of the first {len(words)} words read as SMILES (first: {words[0][:60]!r}); "
                "molecules are prepared with `exlm prepare smiles`."
            )


class BlockCutter:
    """A stream of ids cut into blocks of at most `payload` ids; every id is in exactly one block, in order.

    A block ends before the start of a word, unless one word alone is longer than a block.
    """

    def __init__(self, payload: int, starts_word: np.ndarray):
        self._payload, self._starts_word = payload, starts_word
        self._rest = np.empty(0, dtype=np.int32)

    def feed(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks that are complete with these ids: (tokens [sum of lengths], lengths int64 [m])."""
        buffer = np.concatenate([self._rest, tokens]).astype(np.int32, copy=False)
        starts = np.flatnonzero(self._starts_word[buffer])
        edges = [0]
        while len(buffer) - edges[-1] > self._payload:
            limit = edges[-1] + self._payload
            place = int(np.searchsorted(starts, limit, side="right")) - 1
            edges.append(int(starts[place]) if place >= 0 and starts[place] > edges[-1] else limit)
        self._rest = buffer[edges[-1] :]
        return buffer[: edges[-1]], np.diff(edges)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The last block, if anything is left."""
        rest, self._rest = self._rest, self._rest[:0]
        return rest, np.array([len(rest)] if len(rest) else [], dtype=np.int64)


class _Blocks:
    """Blocks in order in a file, with their lengths and hashes; open for adding inside `with`."""

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
        place = 0
        for length in lengths.tolist():
            self.hashes.append(content_hash(content[place : place + 4 * length]))
            place += 4 * length
        self.lengths.extend(lengths.tolist())
        self._file.write(content)

    def read(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        lengths = np.frombuffer(self.lengths, dtype=np.int64)
        with open(self._path, "rb") as file:
            for first in range(0, len(lengths), BLOCKS_PER_WRITE):
                part = lengths[first : first + BLOCKS_PER_WRITE]
                yield np.fromfile(file, dtype="<i4", count=int(part.sum())), part


def read_documents(rows: Iterator[Row], quarantine: Quarantine) -> Iterator[str]:
    """Documents with at least one word: runs of lines between blank lines in txt files, rows elsewhere."""
    lines: list[str] = []
    file = None
    for row in rows:
        if row.file != file:
            if lines:
                yield "\n".join(lines)
            lines, file, grouped = [], row.file, _is_lines(row.file)
        problem = row.problem or ("" if is_utf8(row.text) else "not UTF-8")
        if problem:
            quarantine.add(row, problem)
        elif row.text.strip():
            if grouped:
                lines.append(row.text)
            else:
                yield row.text
        elif lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


def encode_documents(folder: str, documents: list[str]) -> np.ndarray:
    """Ids of the documents with the tokenizer saved in `folder`, joined."""
    return _loaded(folder).encode_batch(documents)[0]


def _is_lines(name: str) -> bool:
    return Path(name).suffix != "" and file_format(Path(name)) == "txt"


@lru_cache(maxsize=1)
def _loaded(folder: str) -> Tokenizer:
    return load_tokenizer(Path(folder))
