"""Documents: what they are in each kind of file, and a file of them that is read again and again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from exlm_dist.prepare.folder import Source, chunked
from exlm_dist.prepare.tally import Tally
from exlm_dist.tokenizers.smiles_tokenizer import split_smiles
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.files import content_hash
from exlm_dist.utils.progress import Progress

SENTENCE_CHARACTERS = 1000
#: A document is read in parts of about so many characters, cut at spaces, and a longer word without regard to them.
PART_CHARACTERS, LONGEST_WORD = 200_000, 1_000_000
#: An input is refused as molecules if of so many first words more than this fraction parse as SMILES.
FIRST_WORDS, LIKE_SMILES = 2000, 0.9
_SPACE = re.compile(r"\s")


class Document(NamedTuple):
    """A text with at least one word, and the rows of which file it is."""

    text: str
    file: str
    rows: int


def read_documents(source: Source, tally: Tally) -> Iterator[Document]:
    """The documents of a source: the lines between blank lines in txt files, single rows elsewhere. What is none is set
    aside in `tally`, which counts all rows as read, but not those of the documents as kept."""
    lines: list[str] = []
    file = ""
    for row in source.rows():
        if lines and (row.file != file or source.is_blank(row)):
            yield Document("\n".join(lines), file, len(lines))
            lines = []
        file = row.file
        if source.is_blank(row):
            continue
        tally.count_read(row)
        if row.problem or not row.text.strip():
            tally.set_aside(row, row.problem or "empty")
        elif row.file in source.of_lines:
            lines.append(row.text)
        else:
            yield Document(row.text, file, 1)
    if lines:
        yield Document("\n".join(lines), file, len(lines))


class Documents:
    """Documents of one source, one per line of the file at `path`, with each run of white space made one space."""

    def __init__(self, path: Path):
        self._path = path
        self.count = self.words = self.characters = 0

    def write(self, source: Source, tally: Tally) -> None:
        """Write all documents of the source; DataError if there is no word in them, or too many rows are set aside."""
        with (
            open(self._path, "w", encoding="utf-8", newline="\n") as file,
            Progress("documents", "documents") as progress,
        ):
            for document in read_documents(source, tally):
                for number, words in enumerate(_words(document.text)):
                    text = " ".join(words)
                    file.write(f" {text}" if number else text)
                    self.words += len(words)
                    self.characters += len(text) + 1
                file.write("\n")
                tally.keep(document.file, document.rows)
                tally.check_limit()
                self.count += 1
                progress.update(1)
        if not self.words:
            raise DataError(_no_words(source, tally))
        tally.check_limit(1)

    def read(self) -> Iterator[str]:
        """The documents in order, long ones in parts that are cut at spaces."""
        if not self.count:
            return
        with open(self._path, encoding="utf-8", newline="\n") as file:
            for line in file:
                yield from _parts(line[:-1])

    def sentences(self, sample_bytes: int) -> Iterator[str]:
        """About `sample_bytes` of the text, chosen by hash, in pieces of some `SENTENCE_CHARACTERS`. Longer words, as
        texts without spaces have, are cut: the trainer leaves out what is longer than its longest sentence."""
        limit = int(min(1.0, sample_bytes / max(self.characters, 1)) * 2**64)
        for part in self.read():
            words = (piece for word in part.split(" ") for piece in _cut(word, SENTENCE_CHARACTERS))
            for some in chunked(words, SENTENCE_CHARACTERS, lambda word: len(word) + 1):
                sentence = " ".join(some)
                if content_hash(sentence.encode()) < limit:
                    yield sentence

    def refuse_molecules(self) -> None:
        """DataError if nearly all of the first words are SMILES (numbers are none)."""
        words: list[str] = []
        for part in self.read():
            words += part.split(" ", FIRST_WORDS)[: FIRST_WORDS - len(words)]
            if len(words) >= FIRST_WORDS:
                break
        matches = sum(len(word) > 4 and _is_molecule(word) for word in words)
        if matches > LIKE_SMILES * len(words):
            raise DataError(
                f"{matches} of the first {len(words)} words read as SMILES (first: {words[0][:60]!r}); "
                "molecules are prepared with `exlm prepare smiles`."
            )


def _is_molecule(word: str) -> bool:
    return any(map(str.isalpha, word)) and split_smiles(word) is not None


def _words(text: str) -> Iterator[list[str]]:
    """The words of a text, about `PART_CHARACTERS` of them at a time."""
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + PART_CHARACTERS)
        end = space.start() if space else len(text)
        if words := text[start:end].split():
            yield words
        start = end


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PART_CHARACTERS:
        end = text.find(" ", start + PART_CHARACTERS, start + LONGEST_WORD)
        if end < 0 and len(text) - start <= LONGEST_WORD:
            break
        stop = end if end >= 0 else start + LONGEST_WORD
        yield text[start:stop]
        start = stop + (end >= 0)
    yield text[start:]


def _cut(word: str, size: int) -> list[str]:
    return [word[start : start + size] for start in range(0, len(word), size)] if len(word) > size else [word]


def _no_words(source: Source, tally: Tally) -> str:
    names = ", ".join(str(item["name"]) for item in source.identity[:5])
    why = "the input is empty, or is this the right column (--column)?"
    if tally.examples:
        row, reason = next(iter(tally.examples.values()))[0]
        aside = tally.aside.total()
        why = f"{aside:,} rows cannot be used, first {row.file}, row {row.row}: {reason} ({row.text[:80]!r})."
    return f"no words in {names}: {why}"
