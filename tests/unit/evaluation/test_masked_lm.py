"""Evaluation of checkpoints: its metrics, what it refuses, what it records."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import make_config, make_data, make_run, write_initial_checkpoint
from packed import make_batch

from exlm_dist.checkpoint import reader
from exlm_dist.checkpoint.tensors import model_file
from exlm_dist.config.schema import ModelConfig
from exlm_dist.evaluation import masked_lm
from exlm_dist.evaluation.exact_completions import exact_completions
from exlm_dist.evaluation.masked_lm import Evaluation, evaluate_checkpoint
from exlm_dist.inference.fill import batch_chains
from exlm_dist.model.build import build_model
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL
from exlm_dist.tracking import read_events
from exlm_dist.utils.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(params=["exlm", "mlm"])
def run(request, tmp_path, data) -> Path:
    return make_run(make_config(tmp_path / "runs", request.param, data, request.param))


def test_an_untrained_model_guesses(run, data):
    result = evaluate_checkpoint(run)
    vocabulary = json.loads((data / "manifest.json").read_text())["vocab_size"]
    assert result.nll == pytest.approx(math.log(vocabulary), rel=0.15)
    values = result.values
    assert values["perplexity"] == pytest.approx(math.exp(result.nll)) and 0 <= values["accuracy"] < 0.5
    assert result.sequences == 30 and result.count >= 30 and values["invalid"] == 0 and result.step == 100
    assert result.completed == 30 and 0 <= values["exact"] < 0.5
    assert values["coupling"] == pytest.approx(values["nll"] - values["joint_nll"]) and abs(values["coupling"]) < 0.1
    assert set(result.fingerprints) == {"tokenizer", "data", "model"} and result.budget == "unit-test"
    text = str(result)
    assert "unit-test" in text and "not comparable" in text
    json.dumps(result.as_dict())


def test_both_objectives_are_asked_about_the_same_tokens(tmp_path, data):
    results = [
        evaluate_checkpoint(make_run(make_config(tmp_path / "runs", name, data, name)), record=False)
        for name in ("exlm", "mlm")
    ]
    assert results[0].count == results[1].count and results[0].fingerprints["data"] == results[1].fingerprints["data"]
    exlm, plain = (one.values for one in results)
    # Of the plain model they are the same number.
    assert plain["joint_nll"] == pytest.approx(plain["nll"]) and plain["objective_nll"] == pytest.approx(plain["nll"])
    assert exlm["joint_nll"] != pytest.approx(exlm["nll"], rel=1e-6) and exlm["objective_nll"] != exlm["joint_nll"]


def test_options_and_repeatability(run):
    once, again = (evaluate_checkpoint(run, sequences=7, mask_ratio=0.4, split="train", record=False) for _ in range(2))
    assert once == again and once.sequences == 7 and once.mask_ratio == 0.4
    fewer = evaluate_checkpoint(run, sequences=7, mask_ratio=0.4, split="train", complete=0, record=False)
    assert fewer.values == {name: value for name, value in once.values.items() if name != "exact"}
    assert evaluate_checkpoint(reader.checkpoint_folders(run)[0], record=False).step == 100


@pytest.mark.parametrize("hindrance", ["address", "settings", "disk"])
def test_the_numbers_are_there_whatever_hinders_recording_them(run, monkeypatch, caplog, hindrance):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace("mlflow: false", "mlflow: true") if hindrance == "address" else "broken: ["
    )
    if hindrance == "address":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tmp/mlruns")
    if hindrance == "disk":

        def refused(*_):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(masked_lm, "EventLog", refused)
    with caplog.at_level("WARNING", logger="exlm_dist"):
        assert evaluate_checkpoint(run).nll > 0
    assert "the evaluation is not recorded with its run (" in caplog.text


def test_the_result_becomes_a_child_run_once(run):
    for _ in range(2):
        result = evaluate_checkpoint(run)
    (child,) = [event for event in read_events(run / "events.jsonl") if event["kind"] == "child_run"]
    assert child["step"] == 100 and child["values"]["valid/nll"] == result.nll
    assert child["tags"]["checkpoint.sha256"] == result.fingerprints["model"] and child["tags"]["budget"] == "unit-test"
    assert not (run.parent / "mlflow.db").exists()  # tracking.mlflow is off


def test_another_tokenizer_is_refused_naming_both(run, data, tmp_path):
    other = make_data(tmp_path / "other", extra_token="[K+]")
    with pytest.raises(DataError) as caught:
        evaluate_checkpoint(run, data=other)
    message = str(caught.value)
    fingerprints = [
        json.loads((folder / "manifest.json").read_text())["tokenizer"]["fingerprint"][:12] for folder in (data, other)
    ]
    assert all(part in message for part in (*fingerprints, str(other), "--tokenizer"))


def test_data_that_is_not_there(run, tmp_path):
    with pytest.raises(DataError, match="exlm prepare"):
        evaluate_checkpoint(run, data=tmp_path / "nowhere")


@pytest.mark.parametrize("ratio", [0.0, 1.0, -1])
def test_mask_ratio_is_checked(run, ratio):
    with pytest.raises(ConfigError, match="mask ratio"):
        evaluate_checkpoint(run, mask_ratio=ratio)


@pytest.mark.parametrize("options", [{"sequences": 0}, {"sequences": -3}, {"complete": -1}])
def test_numbers_of_sequences_are_checked(run, options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name} = .*must be at least"):
        evaluate_checkpoint(run, **options)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, caplog):
    config = reader.read_config(run)
    newer = write_initial_checkpoint(config, run, step=200)
    with open(newer / model_file(0), "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert evaluate_checkpoint(run, record=False).step == 100
    assert "step-00000200" in caplog.text and "damaged" in caplog.text
    with pytest.raises(CheckpointError, match="model-00000.safetensors is damaged"):
        evaluate_checkpoint(newer)


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda folder: (folder / "COMPLETE").unlink(), "no COMPLETE marker"),
        (lambda folder: (folder / "COMPLETE").write_text("0" * 64), "hash in COMPLETE"),
        (lambda folder: (folder / model_file(0)).unlink(), "model-00000.safetensors is missing"),
        (lambda folder: (folder / "state.json").write_text("{}"), "bytes, not"),
    ],
)
def test_what_makes_a_checkpoint_unusable(tmp_path, data, harm, words):
    run = make_run(make_config(tmp_path / "runs", "exlm", data))
    folder = reader.find_checkpoint(run)
    harm(folder)
    with pytest.raises(CheckpointError, match=words):
        reader.verify(folder)
    with pytest.raises(CheckpointError, match="No whole checkpoint.*rejected: step-00000100"):
        reader.find_checkpoint(run)


def test_things_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="there is none"):
        reader.find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        reader.find_checkpoint(tmp_path / "nothing")


def test_the_reader_gives_back_what_was_written(run):
    folder = reader.find_checkpoint(run)
    assert reader.read_state(folder)["step"] == 100 and reader.step_of(folder) == 100
    weights = reader.load_weights(folder)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values()) and "embedding.weight" in weights
    assert reader.load_optimizer(folder) == {}


@pytest.mark.parametrize("objective", ["exlm", "mlm"])
def test_exact_completions_are_those_that_no_other_spelling_beats(objective):
    """Targets of every other sequence are set to the best of all spellings."""
    changes = {"states": 3} if objective == "exlm" else {"objective": "mlm", "states": 1, "anchors": False}
    config = ModelConfig(layers=1, width=16, heads=2, ffn=16, max_positions=64, init_std=0.4, **changes)
    vocab_size = NUM_SPECIAL + 6
    model = build_model(config, vocab_size, seed=2).eval()
    batch = make_batch([6, 9, 4, 7], states=config.states, anchors=config.anchors, vocab_size=vocab_size, ratio=0.3)
    for row, chain in enumerate(batch_chains(model, batch, torch.device("cpu"), first=0)):
        rows = np.arange(*batch.cu_targets[row : row + 2])
        masked = rows[batch.is_masked[rows]]
        spellings = list(itertools.product(range(vocab_size), repeat=len(masked)))
        ranked = sorted(spellings, key=chain.log_probability)
        batch.target_ids[masked] = ranked[-1 - row % 2]
    assert exact_completions(model, [batch, batch], torch.device("cpu")) == 4


def test_metrics_carry_the_split():
    names = ("nll", "accuracy", "perplexity", "joint_nll", "coupling", "objective_nll", "invalid")
    result = Evaluation(
        run="r",
        budget="",
        objective="mlm",
        states=1,
        checkpoint="c",
        step=1,
        split="train",
        sequences=1,
        mask_ratio=0.1,
        count=1,
        completed=0,
        values=dict.fromkeys(names, 0.0),
        fingerprints={},
    )
    assert set(result.metrics()) == {f"train/{name}" for name in names} and "not labelled" in str(result)
