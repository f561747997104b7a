"""The tracking URI, and how it is printed without passwords."""

from __future__ import annotations

import os
import re
from pathlib import Path

from exlm_dist.utils.errors import ConfigError
from exlm_dist.utils.outputs import user_path

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s'\"]+@")
_SECRET_QUERY = re.compile(r"(?i)\b((?:password|passwd|token|secret|api_?key|access_?key)=)[^&\s'\"]+")


def redact(text: str) -> str:
    """`text` without user names, passwords and tokens of URIs: `https://***@host`."""
    return _SECRET_QUERY.sub(r"\1***", _CREDENTIALS.sub("***@", text))


def tracking_uri(setting: str, runs: Path) -> str:
    """The setting, else MLFLOW_TRACKING_URI, else SQLite `mlflow.db` in the folder of runs.

    ConfigError for a plain folder or `file:`, which MLflow no longer accepts.
    """
    uri = setting or os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{runs.resolve() / 'mlflow.db'}"
    if uri.startswith("sqlite:///~"):
        uri = f"sqlite:///{user_path(uri.removeprefix('sqlite:///'))}"
    if uri.startswith("file:") or "://" not in uri and not uri.startswith("databricks"):
        raise ConfigError(
            f"tracking.uri {redact(uri)!r}: MLflow keeps runs in a database or on a server, not in plain files. "
            "Leave it empty, or give sqlite:////absolute/path/mlflow.db or http://host:port."
        )
    return uri
