"""The demo corpus of text: the language reference that `help()` shows, which comes with every Python."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exlm_dist.prepare.folder import Source
from exlm_dist.prepare.summary import Summary
from exlm_dist.prepare.text import prepare_text
from exlm_dist.tables.records import Row


def demo_documents() -> list[str]:
    """The topics of `pydoc`, sorted by name; a function of the version of Python."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def prepare_demo_text(
    out: Path | str,
    *,
    vocab_size: int = 2000,
    max_length: int = 128,
    workers: int | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Summary:
    """Prepare the demo text as the folder `out`. `settings`: as in `prepare_text`."""
    documents = demo_documents()
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    identity = [{"name": "pydoc topics", "python": platform.python_version(), "sha256": digest}]

    def rows() -> Iterator[Row]:
        for number, text in enumerate(documents, 1):
            yield Row("pydoc", number, text)

    return prepare_text(
        Source(identity, rows),
        out,
        vocab_size=vocab_size,
        max_length=max_length,
        workers=workers or 1,
        overwrite=overwrite,
        **settings,
    )
