"""The table of `exlm config check`: what the planner predicts."""

from __future__ import annotations

from pathlib import Path

from exlm_dist.config import load_config
from exlm_dist.planning.job import Job
from exlm_dist.planning.memory import memory_per_rank
from exlm_dist.planning.report import cost_table, describe

BASE = Path(__file__).resolve().parents[3] / "configs/pretrain/exlm_base_text.yaml"


def test_table_has_every_row_and_takes_the_sizes_given():
    rows = dict(cost_table(load_config(BASE), 50_265, 128, 2))
    assert {"parameters", "FLOPs per step", "expanded length (expected)"} <= set(rows)
    assert "128, 50265" in describe(load_config(BASE), length=128, vocab_size=50_265)


def test_memory_is_that_of_the_planner_and_of_the_device():
    for device, gpu in (("cuda", True), ("cpu", False)):
        config = load_config(BASE, ["--launch.device", device])
        peak = memory_per_rank(Job(config, 50_265, 128, 8, gpu))
        (shown,) = [value for name, value in cost_table(config, 50_265, 128, 8) if name.startswith("memory per rank")]
        assert shown.startswith(f"{peak.total / 2**20:,.0f} MiB at the {peak.moment} (")
