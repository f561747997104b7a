"""`benchmarks/alignment.py`: each arm trains the model that its name says."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from locations import ROOT

from exlm_dist.config import load_config


@pytest.fixture
def alignment(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return pytest.importorskip("alignment")


@pytest.mark.parametrize("size", ["demo", "small"])
def test_arms_are_what_they_are_called(alignment, size: str) -> None:
    options = argparse.Namespace(
        out=Path("out"),
        data=Path("data"),
        size=size,
        steps=0,
        sequences=2048,
        domain="smiles",
        settings=["--masking.ratio", "0.5"],
    )
    found = {}
    for arm in alignment.ARMS:
        _, _, _, _, config, *settings = alignment.command(arm, 0, options)
        loaded = load_config(config, settings)
        assert loaded.masking.ratio == 0.5
        model = loaded.model
        found[arm] = (model.objective, model.transitions, model.jump_prior, model.jump_width)
    assert found == {
        "plain": ("mlm", "uniform", "none", 0),
        "plain-long": ("mlm", "uniform", "none", 0),
        "sparse": ("exlm", "sparse", "none", 0),
        "dense": ("exlm", "dense", "none", 0),
        "dense-gaussian": ("exlm", "dense", "gaussian", 1),
        "dense-laplace": ("exlm", "dense", "laplace", 1),
        "dense-group": ("exlm", "dense", "group", 0.125),
        "dense-group-wide": ("exlm", "dense", "group", 0.25),
        "dense-lanes": ("exlm", "dense", "gaussian", 0.4),
    }
