"""Averages of checkpoints: their values, what is refused, and that they are taken wherever a checkpoint is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from made_run import MOLECULES, make_config, make_data, make_run, write_initial_checkpoint

from exlm_dist.checkpoint import rank_files, reader, storage
from exlm_dist.checkpoint.average import average_checkpoints
from exlm_dist.cli import main
from exlm_dist.config import dump_config
from exlm_dist.evaluation.masked_lm import evaluate_checkpoint
from exlm_dist.export.hf.hf_folder import export_hf
from exlm_dist.inference.embed import embed_texts
from exlm_dist.inference.loading import load_checkpoint
from exlm_dist.tracking import EVENTS, read_events
from exlm_dist.training.resources import Resources
from exlm_dist.training.starting_point import find_starting_point
from exlm_dist.utils.checkpoint_names import checkpoint_folder
from exlm_dist.utils.errors import CheckpointError, ConfigError

STEPS = (20, 60, 100)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> Path:
    """A run folder with checkpoints of three steps."""
    config = make_config(tmp_path_factory.mktemp("runs"), "run", data)
    run = make_run(config)
    initial = reader.load_weights(checkpoint_folder(run, 100))
    generator = np.random.default_rng(4)
    for step in STEPS:
        scale = 10.0 ** generator.integers(-3, 3)
        write_checkpoint(
            run,
            step,
            model={
                name: (value.numpy() + scale * generator.standard_normal(value.shape)).astype(np.float32)
                for name, value in initial.items()
            },
            optimizer={},
            state={"step": step, "seed": 0, "data_fingerprint": "f00d", "evaluation": {"nll": 1.0}, "layout": {}},
            config=dump_config(config),
            tokenizer=data / "tokenizer",
        )
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def saved(run: Path) -> list[Path]:
    return [checkpoint_folder(run, step) for step in STEPS]


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], [0.1, 0.1, 1e9]])
def test_each_parameter_is_the_mean_in_fp64_rounded_once(run, tmp_path, weights):
    average_checkpoints(saved(run), tmp_path / "out", weights)
    parts = [reader.load_weights(folder) for folder in saved(run)]
    found = reader.load_weights(tmp_path / "out")
    assert list(found) == list(parts[0])
    for name, value in found.items():
        exact = np.average([part[name].double().numpy() for part in parts], axis=0, weights=weights)
        # fp32 differs from the exact mean by its rounding alone.
        assert np.all(np.abs(value.numpy() - exact) <= np.spacing(np.abs(value.numpy())) * 0.5001)
        assert value.dtype == torch.float32 and value.shape == parts[0][name].shape


def test_what_it_says_of_itself(run, tmp_path, capsys):
    out = tmp_path / "new" / "mean of three"
    paths = [str(folder) for folder in saved(run)]
    assert main(["average", *paths, "--out", str(out), "--weights", "1", "1", "2"]) == 0
    assert "step-00000100 x 0.5" in capsys.readouterr().out
    state = reader.read_state(out)
    assert state["step"] == 100 == reader.step_of(out) and state["data_fingerprint"] == "f00d"
    assert not {"evaluation", "layout"} & state.keys()  # of one of them, not of the mean
    assert [source["weight"] for source in state["origin"]["sources"]] == [0.25, 0.25, 0.5]
    for folder, source in zip(saved(run), state["origin"]["sources"]):
        assert source["sha256"] == reader.reference(folder)["checkpoint.sha256"] and source["path"] == str(folder)
    assert reader.load_optimizer(out) == {} and [path.name for path in out.parent.iterdir()] == [out.name]


def test_it_is_taken_wherever_a_checkpoint_is(run, tmp_path, data):
    out = tmp_path / "mean"
    average_checkpoints(saved(run), out)
    events = (run / EVENTS).read_bytes()
    assert evaluate_checkpoint(out).step == 100
    export_hf(out, tmp_path / "hf")
    assert "average of 3 checkpoints (step 20 x 0.3333, " in (tmp_path / "hf/README.md").read_text()
    assert np.isfinite(embed_texts(load_checkpoint(out), MOLECULES[:2]).vectors).all()
    assert main(["export", "fairseq", str(out), "--out", str(tmp_path / "theirs.safetensors")]) == 0
    average_checkpoints([out, saved(run)[0]], tmp_path / "mean of a mean")
    assert (run / EVENTS).read_bytes() == events


@pytest.mark.parametrize("place", ["mean", "checkpoints/mean", "means/mean"])
def test_its_results_are_not_those_of_the_step_whose_number_it_has(run, tmp_path, place):
    """The evaluation of neither is taken for that of the other, wherever the folder is."""
    evaluate_checkpoint(checkpoint_folder(run, 100))
    events = list(read_events(run / EVENTS))
    average_checkpoints(saved(run), run / place)
    evaluate_checkpoint(run / place)
    assert list(read_events(run / EVENTS)) == events
    export_hf(run / place, tmp_path / "hf")
    assert "belongs to no run" in (tmp_path / "hf/README.md").read_text()


class Alone(SimpleNamespace):
    """The collectives of one rank."""

    rank, world, local_rank, is_first, device = 0, 1, 0, True, torch.device("cpu")

    def run_everywhere(self, work):
        return work()

    def broadcast_object(self, value):
        return value

    def all_gather_object(self, value):
        return [value]

    run_on_first_rank = run_everywhere


def test_a_run_does_not_resume_from_it(run, tmp_path):
    average_checkpoints(saved(run), tmp_path / "mean")
    placed = checkpoint_folder(run, 101)
    os.rename(tmp_path / "mean", placed)
    config = reader.read_config(run).model_copy(update={"runs": str(run.parent)})
    with Resources() as resources, pytest.raises(CheckpointError) as caught:
        find_starting_point(config, Alone(), resources)
    message = str(caught.value)
    assert f"{placed} is an average of 3 checkpoints" in message and "no run can resume" in message
    assert f"Move it out of {run / 'checkpoints'}" in message and "--init" in message


def test_another_name_than_that_of_a_step_tells_no_step(run, tmp_path):
    average_checkpoints(saved(run)[:2], tmp_path / "mean-of-step-9")
    assert reader.step_of(tmp_path / "mean-of-step-9") == 60
    assert reader.reference(tmp_path / "mean-of-step-9")["checkpoint.step"] == "60"
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        reader.step_of(tmp_path)
    (tmp_path / "mean-of-step-9/manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        reader.find_checkpoint(tmp_path / "mean-of-step-9")


def test_an_earlier_average_is_replaced_and_nothing_else(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    average_checkpoints(saved(run), out)
    before = reader.reference(out)
    average_checkpoints(saved(run)[1:], out)
    assert reader.reference(out) != before and reader.verify(out)
    (tmp_path / "file").write_text("mine")
    imported = Path(shutil.copytree(saved(run)[0], tmp_path / "a checkpoint of training"))
    for taken in (tmp_path / "file", run, imported):
        with pytest.raises(ConfigError, match="no earlier output of `exlm average`"):
            average_checkpoints(saved(run), taken)
    with pytest.raises(ConfigError, match="only training writes"):
        average_checkpoints(saved(run), checkpoint_folder(run, 7))
    with pytest.raises(ConfigError, match="is one of the checkpoints"):
        average_checkpoints([*saved(run), out], out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a checkpoint of training", "file", "out", "run"]


def test_arguments_that_make_no_average(run, tmp_path):
    def refused(words: str, checkpoints: list[Path], weights=None) -> None:
        with pytest.raises(ConfigError, match=words):
            average_checkpoints(checkpoints, tmp_path / "out", weights)

    refused("two checkpoints or more", [run])
    refused("is given twice", [run, saved(run)[-1]])
    refused("2 numbers for 3", saved(run), [1, 2])
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        refused("must be above 0", saved(run), [1, wrong, 1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    "section, value, words",
    [
        ("model", {"ffn": 36}, "model.ffn is 32 in the one and 36"),
        ("model", {"norm": "post"}, "model.norm is pre in the one and post"),
        ("seed", 1, "seed is 0 in the one and 1"),
        ("data", "other", "their tokenizers differ"),
        ("model", {"dropout": 0.3}, None),
    ],
)
def test_checkpoints_of_other_runs(run, tmp_path, data, section, value, words):
    config = make_config(tmp_path / "other", "other", data)
    if section == "data":
        other = make_data(tmp_path / "data", extra_token="[K+]")
        config = make_config(tmp_path / "other", "other", other)
    elif section == "model":
        config = config.model_copy(update={"model": config.model.model_copy(update=value)})
    else:
        config = config.model_copy(update={section: value})
    (tmp_path / "other").mkdir()
    write_initial_checkpoint(config, tmp_path / "other", 5)
    sources = [saved(run)[0], tmp_path / "other"]
    if words is None:
        average_checkpoints(sources, tmp_path / "out")
        return
    with pytest.raises(ConfigError, match=f"not of one run: .*{words}"):
        average_checkpoints(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_what_was_there(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    average_checkpoints(saved(run), out)
    before = reader.reference(out)

    def full(*_):
        raise OSError(28, "No space left on device")

    for module, name in ((rank_files, "write_all"), (storage, "write_file"), (storage.os, "rename")):
        with monkeypatch.context() as patch, pytest.raises(rank_files.SaveFailed, match="No space left"):
            patch.setattr(module, name, full)
            average_checkpoints(saved(run)[1:], out)
        assert reader.verify(out) and reader.reference(out) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    damaged = saved(run)[0] / "state.json"
    damaged.write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=r"state.json has .* bytes"):
        average_checkpoints(saved(run), out)
