"""Where the repository and the reference data are."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def shared_path() -> Path:
    """Folder of golden values and real data: EXLM_SHARED, else `shared` beside the repository."""
    return Path(os.environ.get("EXLM_SHARED", ROOT.parent / "shared")).resolve()
