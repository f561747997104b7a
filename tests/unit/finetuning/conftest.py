"""A tiny checkpoint, and a model fine-tuned on a table of molecules."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_run import make_config, make_data, write_initial_checkpoint
from molecule_table import finetune_arguments, molecule_rows, write_table

from exlm_dist.cli import main
from exlm_dist.config import dump_config

MODEL = {"layers": 2, "width": 16, "heads": 2, "ffn": 32, "states": 4, "max_positions": 64}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model of molecules, with its initial weights."""
    folder = tmp_path_factory.mktemp("pretrained")
    data = make_data(folder / "data")
    config = make_config(folder, "tiny", data, model=MODEL)
    run = folder / "tiny"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config))
    return write_initial_checkpoint(config, run)


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows as csv."""
    return write_table(tmp_path_factory.mktemp("table") / "table.csv", molecule_rows())


@pytest.fixture(scope="session")
def finetuned(checkpoint: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of two, of a binary and a three-class target."""
    out = tmp_path_factory.mktemp("finetuned") / "model"
    assert main(finetune_arguments(checkpoint, table, out, target=["active", "kind"], seeds=2)) == 0
    return out
