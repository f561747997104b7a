"""`exlm plan`: what it accepts, recommends and refuses, without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from exlm_dist.cli import main
from exlm_dist.config import check_config, check_world, load_config
from exlm_dist.planning.hardware import Hardware, step_time
from exlm_dist.planning.planner import GIB, Request, find_plans, recommended
from exlm_dist.planning.report import config_lines
from exlm_dist.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
LARGE = [ROOT / f"configs/pretrain/exlm_{size}_text.yaml" for size in ("1b", "7b")]
SIZES = ["--length", "512", "--vocab-size", "50265"]


def request(path: Path, gpus: int, memory: float = 80, **overrides) -> Request:
    settings = [word for key, value in overrides.items() for word in (f"--{key.replace('__', '.')}", str(value))]
    return Request(load_config(path, settings), 50_265, 512, gpus, memory * GIB, 0.1, Hardware())


@pytest.mark.parametrize("gpus", [64, 256])
@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_large_configurations_are_accepted_and_the_lines_fit(path, gpus):
    """The recommended lines, merged into the file, pass the checks of a run."""
    best = recommended(find_plans(request(path, gpus)))
    pasted = yaml.safe_load("\n".join(config_lines(best.config)))
    overrides = [
        word for section, values in pasted.items() for key, value in values.items()
        for word in (f"--{section}.{key}", str(value).lower())
    ]  # fmt: skip
    config = load_config(path, overrides)
    check_world(config, gpus)
    assert config.parallel == best.config.parallel and config.batch == best.config.batch
    assert best.peak.total <= 72 * GIB


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpus", [64, 256])
def test_large_configurations_fit_as_they_are(path, gpus):
    asked = request(path, gpus)
    check_world(asked.config, gpus)
    assert asked.plan(asked.config).peak.total <= asked.usable


def test_every_layout_offered_works_and_fits():
    asked = request(LARGE[0], 16)
    plans = find_plans(asked)
    for plan in plans:
        check_config(plan.config)
        check_world(plan.config, 16)
        assert plan.peak.total <= asked.usable and plan.config.parallel.tensor <= 8
    assert [plan.time.total for plan in plans] == sorted(plan.time.total for plan in plans)
    assert len({str(plan.config.parallel) + str(plan.config.batch.micro) for plan in plans}) == len(plans)
    grids = {(plan.job.tensor, plan.job.pipeline) for plan in plans}
    assert {(1, 1), (2, 1), (1, 2), (4, 4), (8, 2)} <= grids


def test_time_goes_with_the_hardware():
    asked = request(LARGE[0], 64, parallel__tensor=8, parallel__pipeline=2, batch__micro=4)
    job = asked.plan(asked.config).job
    base = step_time(job, Hardware())
    assert base.total == pytest.approx(sum(vars(base).values()))
    assert step_time(job, Hardware(flops=2 * 989e12)).compute < base.compute
    assert step_time(job, Hardware(link_bandwidth=900e9)).tensor == pytest.approx(base.tensor / 2)
    assert step_time(job, Hardware(network_bandwidth=25e9)).pipeline == pytest.approx(2 * base.pipeline)
    assert step_time(job, Hardware(node_size=4)).tensor > 5 * base.tensor, "a tensor group across nodes"


def test_recorded_steps_of_an_h100():
    """Base shape, one GPU: 169.5, 95.4 (128 tokens), 207 and 114 ms (512), to a tenth."""
    for objective, length, micro, recorded in (
        ("exlm", 128, 512, 0.1695), ("mlm", 128, 512, 0.0954), ("exlm", 512, 128, 0.207), ("mlm", 512, 128, 0.114)
    ):  # fmt: skip
        path = ROOT / f"configs/pretrain/{objective}_base_text.yaml"
        asked = request(path, 1, batch__sequences=micro, batch__micro=micro)
        asked = Request(**{**vars(asked), "vocab_size": 50_304, "length": length})
        plan = asked.plan(asked.config)
        assert plan.time.total == pytest.approx(recorded, rel=0.1)


def test_refusal_names_the_part_and_remedies_that_work():
    with pytest.raises(ConfigError) as refused:
        find_plans(request(LARGE[1], 8, memory=16))
    text = str(refused.value)
    assert text.startswith("no layout of exlm_7b_text fits on 8 GPUs of 16 GiB. The smallest (tensor 8, pipeline 1, ")
    assert re.search(r"needs 1\d\.\d GiB of the 14\.4 GiB that .*; the largest part is optimizer, 9\.\d GiB \(at", text)
    memory, gpus = (int(re.search(rf"--{name} (\d+)", text)[1]) for name in ("gpu-memory", "gpus"))
    assert memory > 16 and gpus > 8
    assert find_plans(request(LARGE[1], 8, memory=memory)) and find_plans(request(LARGE[1], gpus, memory=16))
    assert "parallel.offload true" in text and find_plans(request(LARGE[1], 8, memory=16, parallel__offload=True))


def test_activations_that_fit_nowhere_ask_for_shorter_sequences():
    asked = request(LARGE[0], 1, memory=24, parallel__offload=True)
    long = Request(**{**vars(asked), "length": 65_536})
    with pytest.raises(ConfigError, match=r"largest part is scratch, .* \(at the loss\)\.\n.*sequences of \d+ tokens"):
        find_plans(long)


def test_a_batch_that_no_layout_divides():
    words = r"works on 11 GPUs: batch.sequences 100 is not a multiple of 11.*Nearest that fit"
    with pytest.raises(ConfigError, match=words):
        find_plans(request(LARGE[0], 11, batch__sequences=100, batch__micro=1, model__layers=7))


def test_command_without_torch(capsys):
    """On a login node torch cannot be imported."""
    arguments = ["plan", str(LARGE[0]), "--gpus", "64", "--gpu-memory", "80", *SIZES]
    code = f"import sys; sys.modules['torch'] = None; from exlm_dist.cli import main; sys.exit(main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("exlm_1b_text: 1,3") and "64 GPUs of 80 GiB" in lines[1]
    assert lines[-2].startswith("parallel: {tensor: ") and lines[-1].startswith("batch: {sequences: 2048, micro: ")
    assert sum(line.startswith("*") for line in lines) == 1


def test_command_says_what_it_assumes_and_refuses(capsys):
    assert main(["plan", str(LARGE[0]), "--gpus", "64"]) == 0
    assert "assumed, as data/text_512 is not prepared" in capsys.readouterr().out
    assert main(["plan", str(LARGE[1]), "--gpus", "1", "--gpu-memory", "8", *SIZES]) == 2
    assert "What would fit: --gpu-memory" in capsys.readouterr().err
