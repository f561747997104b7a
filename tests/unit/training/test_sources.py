"""What is said of the sources of a run: before its ranks start, at its start, and as it goes on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from made_run import make_config, make_data, with_sources

from exlm_dist.config import RunConfig
from exlm_dist.data.opening import open_training_data
from exlm_dist.doctor.machine_checks import check_shards
from exlm_dist.doctor.preflight import check_run
from exlm_dist.planning.report import prepared_sizes
from exlm_dist.training.sources import Sources
from exlm_dist.utils.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {"drugs": make_data(root / "drugs"), "few": make_data(root / "few", repeats=1)}


def config_of(runs: Path, folders: dict[str, Path], amount: dict[str, float]) -> RunConfig:
    sources = {name: {"path": str(folder), "weight": 1} for name, folder in folders.items()}
    sources["few"] = {"path": sources["few"]["path"], **amount}
    return with_sources(make_config(runs, "run", Path(), schedule={"steps": 30}), sources)


def test_sources_are_announced_and_one_that_is_repeated_often_is_warned_of(folders, tmp_path, caplog):
    config = config_of(tmp_path, folders, {"weight": 0.25})
    sources = Sources.of(config, open_training_data(config.data))
    with caplog.at_level(logging.INFO, logger="exlm_dist"):
        sources.announce()
    said = [record.getMessage() for record in caplog.records]
    tokens = int(sources.data.lengths[:60].sum()) + 2 * 60
    assert said[0].startswith(f"source drugs: 60 sequences, {tokens:,} tokens in {folders['drugs']}; 80.0% of all")
    assert said[0].endswith("3.20 epochs by step 30")
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]
    assert said[2].startswith("source few will be read 4.8 times")
    assert sources.metrics(15, [9, 5]) == {
        "progress/drugs/epochs": 96 / 60,
        "progress/drugs/tokens": 9,
        "progress/few/epochs": 24 / 10,
        "progress/few/tokens": 5,
    }


def test_what_would_end_the_ranks_is_said_before_they_start(folders, tmp_path):
    check_run(config_of(tmp_path, folders, {"epochs": 3}))
    assert len(check_shards(config_of(tmp_path, folders, {"epochs": 3}))) == 2
    assert prepared_sizes([str(folders["few"]), str(tmp_path / "not there")])[0] == 64
    with pytest.raises(ConfigError, match="The run has 240 sequences.*24 x 10 of few"):
        check_run(config_of(tmp_path, folders, {"epochs": 24}))
    other = make_data(tmp_path / "other", extra_token="[K+]")
    with pytest.raises(DataError, match="drugs .* and few .* their tokenizers differ"):
        check_run(config_of(tmp_path, {**folders, "few": other}, {"weight": 1}))
    with pytest.raises(DataError, match="no such folder"):
        check_run(config_of(tmp_path, {**folders, "few": tmp_path / "nowhere"}, {"weight": 1}))
