"""What every tokenizer offers, the ids all of them share, and how a saved one is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from exlm_dist.utils.errors import DataError

BOS, PAD, EOS, UNK, MASK = range(5)
NUM_SPECIAL = 5
SPECIAL_NAMES = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
TOKENIZER_FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """Text to ids and back. No method adds or expects BOS and EOS; `encode` returns no special id but UNK."""

    domain: str  # 'text' or 'smiles'
    vocab_size: int
    fingerprint: str  # changes with anything that changes what `encode` returns

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Raises DataError when the text cannot be represented."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts, joined: (tokens int32 [sum of lengths], lengths int64 [m])."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; BOS, PAD and EOS vanish, UNK and MASK show as `<unk>` and `<mask>`."""
        ...

    def tokens(self) -> list[str]:
        """The written form of every id, [vocab_size]."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer into `folder` (made if missing), for `load_tokenizer`."""
        ...


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer saved in `folder` (or in its `tokenizer/`, as in prepared data and checkpoints).

    Raises DataError when there is none or it cannot be read.
    """
    folder = Path(folder)
    if not (folder / TOKENIZER_FILE).is_file() and (folder / "tokenizer" / TOKENIZER_FILE).is_file():
        folder = folder / "tokenizer"
    path = folder / TOKENIZER_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{folder}: no tokenizer there ({TOKENIZER_FILE}: {error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error}).") from error
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "smiles":
        from exlm_dist.data.smiles_tokenizer import SmilesTokenizer

        return SmilesTokenizer.load(folder)
    if kind == "sentencepiece":
        from exlm_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer.load(folder)
    raise DataError(f"{path}: tokenizer kind {kind!r} is none of 'smiles', 'sentencepiece'.")
