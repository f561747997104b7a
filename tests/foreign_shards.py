"""WebDataset tars as others write them, with every kind of member, and tokenizers to index them with."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from exlm_dist.tokenizers.molecules import make_policy
from exlm_dist.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer, split_smiles

WORDS = "shard tar member index order mask state token block window range cache rank node seed crc step batch".split()
#: Alkanes, alcohols, acids and amines, in RDKit's canonical form; all different.
MOLECULES = [f"{'C' * length}{end}" for length in range(2, 40) for end in ("", "O", "C(=O)O", "N", "Cl", "Br")]


def smiles_tokenizer(folder: Path) -> Path:
    """A tokenizer of `MOLECULES`, saved."""
    counts = Counter(token for molecule in MOLECULES for token in split_smiles(molecule) or ())
    SmilesTokenizer.from_counts(counts, make_policy()).save(folder)
    return folder


def text_tokenizer(folder: Path) -> Path:
    """A small sentencepiece tokenizer, saved."""
    SentencePieceTokenizer.train([text(seed, 40) for seed in range(200)], 360).save(folder)
    return folder


def text(seed: int, words: int) -> str:
    """Random words, of `WORDS` and made up."""
    generator = np.random.default_rng(seed)
    made = ["".join(generator.choice(list("abcdeé"), 5)) for _ in range(words)]
    return " ".join(str(generator.choice([WORDS[int(generator.integers(len(WORDS)))], word])) for word in made)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of these members."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def text_members(texts: Iterable[str], ending: str = "txt") -> list[tuple[str, bytes]]:
    """A member `000000.ENDING` for each text."""
    return [(f"{number:06d}.{ending}", as_member(text, ending)) for number, text in enumerate(texts)]


def as_member(content: str, ending: str) -> bytes:
    """The bytes of a member that holds one text."""
    kind = ending.removesuffix(".gz").rpartition(".")[2]
    if kind in ("json", "jsonl"):
        raw = json.dumps({"text": content, "smiles": content, "n": 1}, ensure_ascii=False).encode()
    else:
        raw = content.encode()
    return gzip.compress(raw, mtime=0) if ending.endswith(".gz") else raw


def npy(array: np.ndarray) -> bytes:
    """A .npy file, an array of objects (a pickle) too."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()
