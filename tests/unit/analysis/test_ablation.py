"""Runs that differ in a few settings: which are one arm, their means, and what of the paper stands beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_run import make_config

from exlm_dist.analysis.ablation import ablation, find_arms
from exlm_dist.evaluation.history import History, Series
from exlm_dist.suites.suite_table import Column, Entry, SuiteTable

FULL = {"objective": "exlm", "states": 4, "transitions": "dense", "rotary": "2d", "anchors": True, "jump_prior": "none"}
PLAIN = {"objective": "mlm", "states": 1, "transitions": "uniform", "rotary": "1d", "anchors": False}


def history(name: str, nll: float, model: dict[str, Any], tokens: float = 1e6, **sections: Any) -> History:
    own = make_config(Path("/runs"), name, Path("/data"))
    values = {**own.model_dump(mode="json"), **sections}
    config = type(own).model_validate({**values, "model": {**values["model"], **model}})
    curves = {"valid/nll": nll, "valid/joint_nll": nll - 0.1, "valid/objective_nll": 9.0, "progress/tokens": tokens}
    steps = np.array([50, 100])
    return History(
        Path("/runs") / name,
        config,
        {key: Series(steps, np.array([2 * value, value]), steps) for key, value in curves.items()},
    )


def judged(values: dict[str, float]) -> SuiteTable:
    """RTE of runs."""
    columns = [
        Column(name, f"{name}@100", "checkpoint", False, {"run": f"/runs/{name}", "step": 100}) for name in values
    ]
    entries = {
        ("rte", "official", name): Entry(
            "rte", "official", name, "accuracy", {}, 1, [{"scores": {"valid": {"accuracy": value}}}], "valid"
        )
        for name, value in values.items()
    }
    return SuiteTable(Path("/judged"), {"suite": "glue"}, {}, [("rte", "official")], columns, entries, [], [])


def test_runs_of_other_seeds_are_one_arm_and_the_papers_figures_stand_beside_their_rows(tmp_path: Path) -> None:
    runs = [
        history("full_0", 0.70, FULL),
        history("full_1", 0.80, FULL, seed=1),
        history("sparse", 0.60, {**FULL, "transitions": "sparse"}),
        history("plain", 0.65, PLAIN),
        history("many", 0.9, {**FULL, "width": 32, "heads": 4, "ffn": 64, "layers": 2}),
    ]
    assert [(arm.label, arm.numbers) for arm in find_arms(runs)] == [
        ("full_0 (reference)", (0, 1)),
        ("transitions sparse", (2,)),
        ("objective mlm", (3,)),
        ("many", (4,)),
    ]
    table = judged({"full_0": 0.50, "full_1": 0.60, "plain": 0.55})
    lines, figure = ablation(runs, [table], tmp_path)
    text = "\n".join(lines)
    assert "| arm | runs | nll @100 steps | joint nll @100 steps | rte accuracy |" in text
    assert "| full_0 (reference) | 2 | 0.750 \u00b1 0.071 | 0.650 \u00b1 0.071 | 0.550 \u00b1 0.071 |" in text
    assert "| transitions sparse | 1 | 0.600 | 0.500 | - |" in text
    assert "| objective mlm | 1 | 0.650 | 0.650 | 0.550 |" in text
    assert "12,059 times the tokens" in text and "Not a reproduction" in text
    assert figure is not None and figure.read_bytes().startswith(b"\x89PNG")
    assert "#d55e00" in figure.with_suffix(".svg").read_text(), "hollow diamonds"
    without, figure = ablation(runs, [], tmp_path)
    assert "paper" not in "\n".join(without), "it publishes no nll"
    assert figure is not None and "#d55e00" not in figure.with_suffix(".svg").read_text()


@pytest.mark.parametrize(
    "runs",
    [
        [history("a", 0.7, FULL), history("b", 0.6, PLAIN)],
        [history("a", 0.7, FULL), history("b", 0.6, FULL, seed=1), history("c", 0.6, FULL, seed=2)],
    ],
)
def test_a_pair_and_runs_of_one_arm_need_no_bars(runs: list[History], tmp_path: Path) -> None:
    assert ablation(runs, [], tmp_path) == ([], None)
    assert not list(tmp_path.iterdir())
