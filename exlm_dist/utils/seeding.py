"""Seeds as pure functions of integers and names, the same on every machine and for every layout."""

from __future__ import annotations

import hashlib


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and their order: `seed_from(seed, "dropout", step, layer)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
