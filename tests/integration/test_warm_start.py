"""A run that starts with the weights of a checkpoint begins with the evaluation of that checkpoint, in every layout."""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import elements_of, write_checkpoint
from made_run import make_data
from parallel.harness import on_ranks
from training_runs import tiny, train_on

from exlm_dist.checkpoint import reader
from exlm_dist.checkpoint.pieces import Piece
from exlm_dist.config import RunConfig, dump_config
from exlm_dist.evaluation.masked_lm import evaluate_checkpoint
from exlm_dist.export.hf.hf_folder import export_hf
from exlm_dist.model.build import build_model
from exlm_dist.model.initialisation import initial_value
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tracking import read_events
from exlm_dist.utils.errors import EXIT_DONE, EXIT_SAVED

SIZES: dict[str, Any] = {"model": {"heads": 4}, "batch": {"sequences": 8, "micro": 2}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture(scope="module")
def other_data(tmp_path_factory) -> Path:
    """The same molecules by a tokenizer with another token."""
    return make_data(tmp_path_factory.mktemp("other") / "prepared", extra_token="[K+]")


@pytest.fixture(scope="module")
def source(data, tmp_path_factory) -> Path:
    """Checkpoint of step 7 whose weights are no initial values."""
    folder = tmp_path_factory.mktemp("source")
    config = tiny(folder, "base", data, **SIZES)
    model = build_model(config.model, load_tokenizer(data).vocab_size, seed=5)
    dice = np.random.default_rng(0)
    weights = {
        name: value.detach().numpy() + dice.normal(0, 0.2, value.shape).astype(np.float32)
        for name, value in model.named_parameters()
    }
    (folder / "base/checkpoints").mkdir(parents=True)
    about = {"state": {"step": 7}, "config": dump_config(config), "tokenizer": data / "tokenizer"}
    return write_checkpoint(folder / "base", 7, model=weights, optimizer={}, **about)


@pytest.fixture(scope="module")
def evaluated(source) -> float:
    """nll of the source on the held-out sequences that its runs evaluate."""
    return evaluate_checkpoint(source, sequences=10, record=False).nll


def start(process, settings, cases, wanted, folder):
    """For each layout in turn: a new run that starts with `init`. What it works with are the `wanted` weights; its
    evaluation, and the loss of its first step."""
    from exlm_dist.parallel.layout import Layout
    from exlm_dist.parallel.process_groups import Grid
    from exlm_dist.training.resources import Resources
    from exlm_dist.training.session import build_session
    from exlm_dist.training.starting_point import find_starting_point

    results = []
    for number, (parallel, dtype) in enumerate(cases):
        changed = {"runs": f"{folder}/{number}", "parallel": parallel, "precision": {"dtype": dtype}}
        config = RunConfig.model_validate({**settings, **changed})
        grid = Grid.make(Layout.of(config.parallel, process.world), process.rank)
        placed = dataclasses.replace(process, grid=grid)
        with Resources() as resources:
            session = build_session(config, placed, find_starting_point(config, placed, resources), resources)
            assert session.step == 0
            compare_weights(session.engine, wanted)
            session.evaluate()
            nll = session.evaluation["nll"]
            session.train_step()
            results.append((nll, session.meter._window.steps[-1].result.loss.item()))
            session.engine.close()
            resources.status = "KILLED"
    return results


def compare_weights(engine, wanted):
    """This rank's part of the weights, as it computes with them, and its fragment of the master copy: fp32, exact."""
    import deepspeed
    import torch

    from exlm_dist.training.engine.fragments import fragments_of

    fragments = fragments_of(engine)
    for sharded in engine.parameters:
        size = int(np.prod(sharded.part_shape))
        part = torch.from_numpy(elements_of(wanted[sharded.name], Piece(sharded.slice, 0, size, 0)).copy())
        with deepspeed.zero.GatheredParameters([sharded.parameter], enabled=engine.zero == 3):
            local = sharded.parameter.detach().reshape(-1)[:size]
            assert torch.equal(local, part.to(local.dtype)), sharded.name
        first, last = (min(bound, size) for bound in fragments.bounds(sharded))
        if first < last:
            assert torch.equal(fragments.read(sharded, None)[: last - first], part[first:last]), sharded.name


#: DeepSpeed allows no plain engine in a process that has had a tensor-parallel one.
CASES = [
    ({"zero": 0}, "fp32"),
    ({"zero": 1}, "bf16"),
    ({"zero": 3}, "fp32"),
    ({"tensor": 2}, "fp32"),
    ({"pipeline": 2}, "fp32"),
]


def test_every_layout_starts_with_the_same_weights_and_their_evaluation(data, source, evaluated, tmp_path):
    wanted = {name: value.numpy() for name, value in reader.load_weights(source).items()}
    config = tiny(tmp_path, "new", data, init=str(source), seed=3, **SIZES)
    (tmp_path / "one").mkdir()
    [[alone]] = on_ranks(start, 1, config.model_dump(), [({}, "fp32")], wanted, str(tmp_path / "one"))
    assert alone[0] == pytest.approx(evaluated, rel=1e-5)
    ranks = on_ranks(start, 2, config.model_dump(), CASES, wanted, str(tmp_path))
    for number, case in enumerate(CASES):
        tolerance = 1e-5 if case[1] == "fp32" else 1e-2
        assert ranks[0][number][0] == pytest.approx(evaluated, rel=tolerance), case
        # Each rank has its addend of the loss.
        assert sum(rank[number][1] for rank in ranks) == pytest.approx(alone[1], rel=tolerance), case


def test_another_vocabulary_longer_positions_and_a_new_head(source, other_data, tmp_path):
    """Rows that both have are taken, whatever their number; all others have their initial values."""
    model = {**SIZES["model"], "states": 3, "max_positions": 160, "tie_head": False}
    config = tiny(tmp_path, "new", other_data, init=str(source.parents[1]), seed=3, **{**SIZES, "model": model})
    theirs = {name: value.numpy() for name, value in reader.load_weights(source).items()}
    ours, others = load_tokenizer(other_data).tokens(), load_tokenizer(source).tokens()
    assert len(ours) == len(others) and set(ours) - set(others) == {"[K+]"} and ours != others
    wanted = dict(theirs)

    def fresh(name, shape):
        return initial_value(name, shape, seed=3, std=config.model.init_std).numpy()

    for name, origin in (
        ("embedding.weight", "embedding.weight"),
        ("output.weight", "embedding.weight"),
        ("output.bias", "output.bias"),
    ):
        rows = fresh(name, theirs[origin].shape)
        wanted[name] = np.stack(
            [theirs[origin][others.index(token)] if token in others else row for token, row in zip(ours, rows)]
        )
    positions = "output.transition.positions.weight"
    wanted[positions] = np.concatenate([theirs[positions], fresh(positions, (160, 16))[len(theirs[positions]) :]])
    cases = [({"zero": 3}, "fp32"), ({"tensor": 2}, "fp32")]
    on_ranks(start, 2, config.model_dump(), cases, wanted, str(tmp_path))


def test_the_run_notes_where_its_weights_came_from_and_needs_the_source_no_more(source, evaluated, data, tmp_path):
    """From an export for transformers to a plain model."""
    (tmp_path / "runs").mkdir()
    export_hf(source, tmp_path / "export")
    plain = {**SIZES["model"], "objective": "mlm", "states": 1, "anchors": False}
    config = tiny(
        tmp_path / "runs", "new", data, init=str(tmp_path / "export"), **{**SIZES, "model": plain},
        schedule={"steps": 6}, evaluation={"every": 3},
    )  # fmt: skip
    assert train_on(config, 1, ("signal", 0, 3, signal.SIGTERM)) == [EXIT_SAVED]
    shutil.rmtree(tmp_path / "export")
    assert train_on(config, 1) == [EXIT_DONE]
    run = tmp_path / "runs/new"
    init = reader.read_state(reader.newest_checkpoint(run))["init"]
    assert init["path"] == str(tmp_path / "export") and re.fullmatch("[0-9a-f]{64}", init["sha256"])
    assert init["initialised"] == [] and all("transition" in name for name in init["unused"]) and init["unused"]
    events = list(read_events(run / "events.jsonl"))
    noted = {key: value for event in events if event["kind"] == "tags" for key, value in event["values"].items()}
    assert noted["init.sha256"] == init["sha256"] and noted["init.taken"] == str(init["taken"])
    steps = [event["step"] for event in events if event["kind"] == "metrics" and "valid/nll" in event["values"]]
    assert steps == [0, 3, 6]
