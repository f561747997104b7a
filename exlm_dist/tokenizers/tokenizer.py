"""The interface of a tokenizer, and the special ids that all tokenizers have in common."""

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
    """Text to ids and back. No method adds or expects BOS or EOS; `encode` returns no special id except UNK."""

    domain: str  # 'text' or 'smiles'
    vocab_size: int
    fingerprint: str  # differs whenever `encode` may return something different

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Raises DataError if the text cannot be represented."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the texts, concatenated: (tokens int32 [sum of lengths], lengths int64 [m])."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; BOS, PAD and EOS are dropped, UNK and MASK become `<unk>` and `<mask>`."""
        ...

    def tokens(self) -> list[str]:
        """The token of every id as text, [vocab_size]."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer into `folder` (created if missing), for `load_tokenizer`."""
        ...
