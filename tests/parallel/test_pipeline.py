"""Sharded equals unsharded, through the real engine on real processes: losses, gradients, weights, evaluation."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from integration.training_runs import _before_step, _train, log_of, tiny, train_on
from locations import ROOT
from made_run import make_data
from parallel.harness import RankFailed, on_ranks, run_processes
from parallel.sharded import assembled, pieces

from exlm_dist.config import RunConfig, dump_config
from exlm_dist.parallel.layout import Layout
from exlm_dist.tracking import read_events
from exlm_dist.training.sample_log import samples_of_steps
from exlm_dist.utils.errors import EXIT_DONE, EXIT_RETRY, EXIT_SAVED

STEPS = 10
SECTIONS = {
    "batch": {"sequences": 8, "micro": 2},
    "schedule": {"steps": STEPS, "warmup": 2},
    # A large eps: otherwise a step is nearly the sign of the gradient, also where that is rounding alone.
    "optimizer": {"lr": 1e-2, "clip": 0.5, "eps": 1e-2},
}
#: Elements are compared relative to the largest of their parameter, or to this: the bias of a key cancels in a softmax,
#: so that its gradient, and every update of it, is rounding alone.
SMALLEST = 1e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "prepared")


def trajectory(process, settings):
    """Losses, norms and scores of ten steps, gradients of the first, the weights and the evaluation after the last."""
    from exlm_dist.data.loader import Loader, eval_batches
    from exlm_dist.data.order import Order
    from exlm_dist.data.recipe import Recipe
    from exlm_dist.data.shards import ShardDataset
    from exlm_dist.parallel.process_groups import Grid
    from exlm_dist.training.engine import build_engine
    from exlm_dist.training.step import optimizer_step

    config = RunConfig.model_validate(settings)
    layout = Layout.of(config.parallel, process.world)
    process = dataclasses.replace(process, grid=Grid.make(layout, process.rank))
    datasets = {split: ShardDataset.open(config.data.path, split) for split in ("train", "valid")}
    vocab_size, data = datasets["train"].vocab_size, process.grid.data
    recipe = Recipe.of(config, vocab_size)
    loader = Loader(
        datasets["train"],
        recipe,
        order=Order.of(config.data, config.seed, len(datasets["train"])),
        global_batch=config.batch.sequences,
        rank=data.rank,
        world=data.size,
        prefetch=0,
    )
    engine = build_engine(config, process, vocab_size, 20.0)
    initial = pieces(engine, None)
    rows, first = [], None
    for number in range(STEPS):
        result = optimizer_step(engine, loader.step(number), config, scored=True).result
        scores = [0.0] * 3 if result.scores is None else result.scores.tolist()
        left_out = sum(float(mask.sum()) for mask in result.invalid)
        sums = process.all_gather([float(result.loss), left_out, *scores]).sum(0).tolist()
        rows.append([*sums, float(result.grad_norm)])
        if number == 0:
            first = pieces(engine, "exp_avg")
    asked = Recipe.for_evaluation(config, vocab_size)
    sums = engine.evaluate(eval_batches(datasets["valid"], asked, sequences=10, rank=data.rank, world=data.size))
    evaluation = process.all_gather(sums.vector()).sum(0).tolist()
    after = optimizer_step(engine, loader.step(STEPS), config, scored=False)
    rows.append([float(process.all_gather([float(after.result.loss)]).sum())])
    final = pieces(engine, None)
    engine.close()
    return {"rows": rows, "initial": initial, "first": first, "final": final, "evaluation": evaluation}


def measured(config, world):
    """(a row of values per step, initial weights, first gradients, final weights, evaluation); weights unsharded."""
    ranks = on_ranks(trajectory, world, config.model_dump(), timeout=120.0)
    for rank in ranks[1:]:
        assert rank["rows"] == ranks[0]["rows"] and rank["evaluation"] == ranks[0]["evaluation"]
    whole = (assembled([rank[what] for rank in ranks]) for what in ("initial", "first", "final"))
    return ranks[0]["rows"], *whole, ranks[0]["evaluation"]


def deviations(got, wanted):
    """Of each parameter: largest deviation relative to its largest element, or to SMALLEST if that is larger."""
    assert got.keys() == wanted.keys()
    return {name: np.abs(got[name] - wanted[name]).max() / max(np.abs(wanted[name]).max(), SMALLEST) for name in wanted}


def compare(got, wanted, *, replicas=1, bound=1e-5):
    """Everything that `measured` returns; `replicas`: data-parallel degree."""
    rows, initial, first, final, evaluation = got
    for mine, theirs in zip(rows, wanted[0], strict=True):
        if replicas > 1:  # scores are those of the last micro-batch of each replica
            mine, theirs = [*mine[:2], *mine[5:]], [*theirs[:2], *theirs[5:]]
        assert mine == pytest.approx(theirs, rel=bound, abs=1e-7)
    for name, value in wanted[1].items():
        assert np.array_equal(initial[name], value), f"{name} starts differently"
    for name, deviation in deviations(first, wanted[2]).items():
        assert deviation < bound, f"first gradient of {name}: {deviation}"
    for name, deviation in deviations(final, wanted[3]).items():
        assert deviation < bound, f"{name} after {STEPS} steps: {deviation}"
    (mine, small), (theirs, small_theirs) = without_differences(evaluation), without_differences(wanted[4])
    assert mine == pytest.approx(theirs, rel=bound, abs=1e-9)
    # The states of a mask differ by little here, so these sums are mostly rounding.
    assert small == pytest.approx(small_theirs, rel=bound, abs=3e-7)


def without_differences(evaluation):
    """The values of an evaluation, and those among them that are about how far the states of a mask are apart."""
    from exlm_dist.model.alignment import AlignmentTotals
    from exlm_dist.model.scoring import Totals

    first = len(dataclasses.fields(Totals)) - 1
    names = [field.name for field in dataclasses.fields(AlignmentTotals)]
    places = [first + names.index(name) for name in ("within", "between", "token_spread")]
    return [value for i, value in enumerate(evaluation) if i not in places], [evaluation[i] for i in places]


MODELS = {
    "dense": {"model": {"dropout": 0.0, "attention_dropout": 0.0}},
    "dropout": {"model": {"dropout": 0.1, "attention_dropout": 0.1}},
    "sparse": {"model": {"dropout": 0.0, "attention_dropout": 0.0, "transitions": "sparse"}},
    "untied": {"model": {"dropout": 0.1, "attention_dropout": 0.1, "tie_head": False, "layers": 3, "norm": "post"}},
    "mlm": {"model": {"dropout": 0.0, "attention_dropout": 0.0, "objective": "mlm", "states": 1, "anchors": False}},
}


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """`measured` of the unsharded run of each model, once."""
    found = {}

    def of(name):
        if name not in found:
            config = tiny(tmp_path_factory.mktemp("one"), "one", data, **SECTIONS, **MODELS[name])
            found[name] = measured(config, 1)
        return found[name]

    return of


CASES = [
    ("dropout", {"pipeline": 2}, 2),
    ("sparse", {"pipeline": 2, "activation_checkpointing": True}, 2),
    ("mlm", {"pipeline": 2, "offload": True}, 2),
    ("untied", {"pipeline": 3}, 3),
    ("dropout", {"pipeline": 2, "data": 2}, 4),
    ("dropout", {"tensor": 2, "pipeline": 2}, 4),
    ("sparse", {"tensor": 2, "pipeline": 2, "sequence": True}, 4),
    ("dropout", {"tensor": 2, "data": 2, "zero": 2}, 4),
    ("dense", {"tensor": 2, "zero": 0, "sequence": True}, 2),
    ("mlm", {"tensor": 2, "zero": 1}, 2),
    ("dropout", {"tensor": 2, "zero": 3, "data": 2, "sequence": True}, 4),
]


@pytest.mark.parametrize("model, parallel, world", CASES, ids=str)
def test_sharded_equals_unsharded(model, parallel, world, reference, data, tmp_path):
    config = tiny(tmp_path, "sharded", data, parallel=parallel, **SECTIONS, **MODELS[model])
    replicas = world // (config.parallel.tensor * config.parallel.pipeline)
    compare(measured(config, world), reference(model), replicas=replicas)


@pytest.mark.parametrize("parallel, world", [({"pipeline": 2}, 2), ({"tensor": 2, "pipeline": 2}, 4)], ids=str)
def test_in_bf16(parallel, world, data, tmp_path):
    """Weights in bf16, gradients summed in fp32: like the unsharded run in bf16, as far as 8 bits of mantissa go."""
    made = {}
    for name, settings, ranks in (("whole", {}, 1), ("sharded", parallel, world)):
        config = tiny(
            tmp_path, name, data, parallel=settings, precision={"dtype": "bf16"}, **SECTIONS, **MODELS["dropout"]
        )
        made[name] = measured(config, ranks)
    (rows, initial, first, final, evaluation), wanted = made["sharded"], made["whole"]
    assert np.array(rows[0]) == pytest.approx(np.array(wanted[0][0]), rel=0.02)
    assert [row[0] for row in rows] == pytest.approx([row[0] for row in wanted[0]], rel=0.02)
    for name in wanted[1]:
        assert np.array_equal(initial[name], wanted[1][name])
        assert np.abs(first[name] - wanted[2][name]).max() < 0.05 * np.abs(wanted[2][name]).max() + 1e-4, name
        assert np.abs(final[name] - wanted[3][name]).max() < 0.05 * np.abs(wanted[3][name]).max() + 1e-3, name
    assert evaluation[0] == pytest.approx(wanted[4][0], rel=0.02)


def left_out(rank, settings, ranks):
    """On `ranks`, all of a last stage, sequence 0 of every micro-batch of step 5 has likelihood zero."""
    from exlm_dist.training.engine import pipeline_engine

    plain, now = pipeline_engine.loss_sum, {"step": -1}
    _before_step(lambda step: now.update(step=step))

    def loss_sum(stream, reduction):
        if rank in ranks and now["step"] == 5:
            zero = torch.tensor([0])
            stream = stream.replace(log_likelihood=stream.log_likelihood.index_fill(0, zero, -torch.inf))
        return plain(stream, reduction)

    pipeline_engine.loss_sum = loss_sum
    return _train(rank, settings, None)


@pytest.mark.parametrize(
    "parallel, ranks", [({"pipeline": 2, "data": 2}, [3]), ({"tensor": 2, "pipeline": 2}, [2, 3])], ids=str
)
def test_sequences_left_out_reach_the_first_rank_once(parallel, ranks, data, tmp_path):
    config = tiny(tmp_path, "few", data, parallel=parallel, loss={"max_invalid": 0.5}, batch=SECTIONS["batch"])
    assert run_processes(left_out, 4, config.model_dump(), ranks) == [EXIT_DONE] * 4
    events = list(read_events(tmp_path / "few/events.jsonl"))
    name = "train/invalid_sequences"
    metrics = [event for event in events if event["kind"] == "metrics" and name in event["values"]]
    counts = {event["step"]: event["values"][name] for event in metrics}
    micro_batches = 4 // Layout.of(config.parallel, 4).data
    assert counts[6] == micro_batches and counts[9] == 0
    tags = [event["values"] for event in events if event["kind"] == "tags"]
    (named,) = [values["invalid_step_6"] for values in tags if "invalid_step_6" in values]
    assert len(named.removeprefix("samples ").split(", ")) == micro_batches


def counted(rank, name):
    """What the benchmark counts on this rank."""
    path = ROOT / "benchmarks/parallel.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_layouts", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark.counted(benchmark.config_of(benchmark.LAYOUTS[name], 4))


@pytest.mark.parametrize("name", ["PP2 DP2", "TP2 PP2 sequence"])
def test_what_is_sent_is_what_the_documentation_says(name):
    """Except for a few scalars on which the ranks agree, and the padding of ZeRO's partitions."""
    stages = [kinds for kinds in run_processes(counted, 4, name) if kinds is not None]
    assert len(stages) == 2 and all({"send", "all_reduce"} <= kinds.keys() for kinds in stages)
    for kinds in stages:
        for kind, (_, number, formula) in kinds.items():
            assert formula <= number <= formula + 64, kind


DEATHS = [
    ({"pipeline": 2}, 2, 0, {"zero": 2, "data": 2}),
    ({"pipeline": 2, "data": 2}, 4, 3, {"tensor": 2}),
    ({"tensor": 2, "pipeline": 2}, 4, 2, {"data": 1}),
    ({"tensor": 2, "data": 2, "zero": 3}, 4, 1, {"pipeline": 2}),
]


#: The sample ids of every step are logged.
NOTED = {"samples": True}


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """The run of the tests below, on one rank and without interruption."""
    config = tiny(tmp_path_factory.mktemp("whole"), "whole", data, batch=SECTIONS["batch"], tracking=NOTED)
    assert train_on(config, 1) == [EXIT_DONE]
    return config


@pytest.mark.parametrize("parallel, world, lost, then", DEATHS, ids=str)
def test_a_killed_rank_ends_all(parallel, world, lost, then, data, tmp_path, uninterrupted):
    """Within 30 s, and every other rank asks to be restarted; another layout then completes the run."""
    config = tiny(tmp_path, "killed", data, parallel=parallel, batch=SECTIONS["batch"], tracking=NOTED)
    codes = train_on(config, world, death=("step", lost, 6), timeout=30.0)
    assert codes == [-signal.SIGKILL if rank == lost else EXIT_RETRY for rank in range(world)], log_of(config)
    config = tiny(tmp_path, "killed", data, parallel=then, batch=SECTIONS["batch"], tracking=NOTED)
    world = config.local_processes
    assert train_on(config, world) == [EXIT_DONE] * world
    assert_same_course(config, uninterrupted)


def assert_same_course(config, other):
    """Every step saw the same samples, and the curves are equal up to the rounding of another layout."""
    samples, wanted = (samples_of_steps(Path(run.runs) / run.name) for run in (config, other))
    assert samples == wanted and len(samples) == config.schedule.steps
    found, curve = points(config), points(other)
    assert found.keys() == curve.keys()
    for point, value in curve.items():
        assert found[point] == pytest.approx(value, rel=1e-4), point


#: (layout, the step before which it is asked to save and end)
ITINERARY = [
    ({"tensor": 2, "data": 2, "zero": 1}, 1),
    ({"pipeline": 2, "zero": 1}, 4),
    ({"data": 4, "zero": 3}, 6),
    ({"data": 1, "zero": 1}, 8),
    ({"tensor": 2, "data": 2, "zero": 1}, None),
]


def test_a_run_goes_from_layout_to_layout_and_back(data, tmp_path, uninterrupted):
    for parallel, end in ITINERARY:
        config = tiny(tmp_path, "moved", data, parallel=parallel, batch=SECTIONS["batch"], tracking=NOTED)
        world = config.local_processes
        asked = None if end is None else ("signal", world - 1, end, signal.SIGTERM)
        assert train_on(config, world, asked) == [EXIT_DONE if end is None else EXIT_SAVED] * world
    assert_same_course(config, uninterrupted)


def stopped(rank, settings, lost):
    _before_step(lambda step: os.kill(os.getpid(), signal.SIGSTOP) if step == 5 and rank == lost else None)
    return _train(rank, settings, None)


def test_a_rank_that_hangs_is_noticed_within_the_limit(data, tmp_path):
    """Also by ranks that wait for it in a process group of DeepSpeed's, or in an exchange between stages."""
    lost = 3
    limits = {"launch": {"timeout": 5}, "watchdog": {"step": 0}, "tracking": {"every": 100}}
    config = tiny(tmp_path, "hang", data, parallel={"tensor": 2, "pipeline": 2}, **limits)
    with pytest.raises(RankFailed) as caught:
        run_processes(stopped, 4, config.model_dump(), lost, timeout=40.0)
    assert [code for rank, code in enumerate(caught.value.codes) if rank != lost] == [EXIT_RETRY] * 3, log_of(config)


def points(config):
    """{(step, name): value} of what does not depend on the layout."""
    names = ("train/loss", "train/lr", "train/grad_norm", "valid/nll", "progress/sequences")
    file = Path(config.runs) / config.name / "events.jsonl"
    events = read_events(file) if file.exists() else []
    return {
        (event["step"], name): event["values"][name]
        for event in events
        if event["kind"] == "metrics"
        for name in names
        if name in event["values"]
    }


def test_the_command_starts_the_ranks_of_the_layout_and_names_the_one_that_was_killed(data, tmp_path):
    sections = {"schedule": {"steps": 100_000, "warmup": 2}, "checkpoint": {"every": 10**6}, "evaluation": {"every": 0}}
    config = tiny(tmp_path, "command", data, launch={"restarts": 0}, **sections)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    layout = ["--parallel.tensor", "2", "--parallel.pipeline", "2"]
    with (tmp_path / "errors").open("w") as errors:
        command = [sys.executable, "-m", "exlm_dist.cli", "pretrain", str(tmp_path / "run.yaml"), *layout]
        launcher = subprocess.Popen(command, stderr=errors)
    try:
        wait_for(lambda: points(config), launcher, seconds=90)
        ranks = {int(rank.environ()["RANK"]): rank for rank in psutil.Process(launcher.pid).children()}
        assert sorted(ranks) == [0, 1, 2, 3]
        ranks[2].kill()
        assert launcher.wait(timeout=30) == EXIT_RETRY
    finally:
        launcher.kill()
        launcher.wait()
    text = (tmp_path / "errors").read_text()
    assert "tensor 2 x pipeline 2 x data 1" in text and "rank 2 was killed by SIGKILL" in text
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks.values())


def wait_for(condition, process, *, seconds):
    """Until `condition()`; fails when `process` ends first, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
