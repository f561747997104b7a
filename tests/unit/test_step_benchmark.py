"""The benchmark of the training step runs at toy size; its times are not checked."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import step

    yield step
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


def test_toy_run_writes_every_figure(step, tmp_path, capsys):
    out = tmp_path / "step.csv"
    assert step.main(["--shape", "toy", "--rounds", "2", "--steps", "1", "--commit", "abc", "--out", str(out)]) == 0
    rows = {row["quantity"]: row for row in csv.DictReader(out.open())}
    ratio = rows["exlm step / mlm step"]
    assert float(ratio["median"]) > 0 and (ratio["least"], ratio["aim"]) == ("1.8", "1.7")
    assert rows["exlm step"]["commit"] == "abc" and rows["exlm step"]["sequences"] == "4"
    assert "| exlm step / mlm step |" in capsys.readouterr().out


def test_the_straightforward_model_has_the_prior_too(step):
    sides, cpu = sys.modules["step_sides"], torch.device("cpu")
    plain, prior = (sides.check_equal(cpu, jump_prior=name) for name in ("none", "group"))
    assert max(plain, prior) < step.TOLERANCE


def test_counts_of_operations(step):
    sides = sys.modules["step_sides"]
    shape = sides.SHAPES["base"]
    flops = {}
    for objective in ("exlm", "mlm"):
        config = sides.model_config(shape, objective, 0.1)
        batch = sides.make_batch(config, shape, 128, 16, seed=0)
        flops[objective] = sides.ideal_flops(config, shape, 128, batch)
        assert 0.9 < sides.needed_flops(config, shape, 128, batch) / flops[objective] < 1
    assert 1.65 < flops["exlm"] / flops["mlm"] < 1.75


def test_master_weights_follow_plain_adamw(step):
    sides = sys.modules["step_sides"]
    ours, plain = (torch.nn.Linear(3, 2) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    optimizers = sides.MasterAdamW(list(ours.parameters())), torch.optim.AdamW(plain.parameters(), **sides.ADAMW)
    for _ in range(3):
        for model, optimizer in zip((ours, plain), optimizers):
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
        plain.zero_grad()
    torch.testing.assert_close(ours.weight, plain.weight)
    assert ours.weight.grad is None
