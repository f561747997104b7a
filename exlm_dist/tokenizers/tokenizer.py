"""What every tokenizer offers, and the special ids that all of them have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

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
