"""Text and molecules to token ids and back; `load_tokenizer` loads a saved tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from exlm_dist.tokenizers.tokenizer import TOKENIZER_FILE, Tokenizer
from exlm_dist.utils.errors import DataError
from exlm_dist.utils.outputs import user_path

__all__ = ["Tokenizer", "load_tokenizer"]


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer saved in `folder`, or in its `tokenizer/` (prepared data, checkpoints).

    Raises DataError if there is none or it cannot be read.
    """
    folder = user_path(folder)
    if not (folder / TOKENIZER_FILE).is_file() and (folder / "tokenizer" / TOKENIZER_FILE).is_file():
        folder = folder / "tokenizer"
    path = folder / TOKENIZER_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{folder}: no tokenizer in this folder ({TOKENIZER_FILE}: {error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON ({error}).") from error
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "smiles":
        from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer

        return SmilesTokenizer.load(folder)
    if kind == "sentencepiece":
        from exlm_dist.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer.load(folder)
    raise DataError(f"{path}: tokenizer kind is {kind!r}; it must be one of 'smiles', 'sentencepiece'.")
