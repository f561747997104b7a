"""A small run folder, and queries of MLflow's SQLite file without MLflow."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from exlm_dist.config import RunConfig, dump_config


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., tuple[Path, RunConfig]]:
    """`make_run(name, uri="", **sections)` -> run folder with its config.yaml, and the config."""

    def make(name: str = "tiny", uri: str = "", **sections) -> tuple[Path, RunConfig]:
        tracking = {"uri": uri, "system": False, **sections.pop("tracking", {})}
        config = RunConfig.model_validate(
            {
                "name": name,
                "runs": str(tmp_path / "runs"),
                "data": {"path": "data/x"},
                "schedule": {"steps": 100},
                "tracking": tracking,
                **sections,
            }
        )
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config))
        return folder, config

    return make


@pytest.fixture
def query(tmp_path: Path) -> Callable[[str], list[tuple]]:
    """`query(sql)` -> rows from the MLflow database of the test."""

    def run(sql: str) -> list[tuple]:
        with sqlite3.connect(tmp_path / "runs" / "mlflow.db", timeout=10) as connection:
            return connection.execute(sql).fetchall()

    return run
