"""Sums over held-out batches: what they are of, and that they add up however the sequences are dealt to batches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from packed import make_batch

from exlm_dist.config.schema import ModelConfig
from exlm_dist.model.build import build_model
from exlm_dist.model.objective import joint_log_probs, single_log_probs
from exlm_dist.model.scoring import Totals, evaluation_sums, score
from exlm_dist.model.stream import Stream

VOCABULARY = 13


@pytest.fixture(params=["dense", "sparse", "no anchors", "plain"])
def config(request) -> ModelConfig:
    sizes = {"layers": 1, "width": 16, "heads": 2, "ffn": 16, "max_positions": 64, "init_std": 0.4}
    kinds = {
        "dense": {"states": 3},
        "sparse": {"states": 3, "transitions": "sparse"},
        "no anchors": {"states": 3, "anchors": False},
        "plain": {"objective": "mlm", "states": 1, "anchors": False},
    }
    return ModelConfig(**sizes, dropout=0.0, attention_dropout=0.0, **kinds[request.param])


def batch_of(config: ModelConfig, lengths: list[int], **options):
    return make_batch(
        lengths, states=config.states, anchors=config.anchors, vocab_size=VOCABULARY, ratio=0.4, **options
    )


def test_sums_add_up_over_batches_and_a_filler_adds_nothing(config):
    model = build_model(config, VOCABULARY, seed=2).eval()
    lengths = [6, 9, 4, 7]
    whole, padded = batch_of(config, lengths), batch_of(config, lengths, bucket=16)
    filler = replace(whole, is_masked=np.zeros_like(whole.is_masked))
    totals = score(model, [whole], "cpu").vector()
    assert score(model, [padded], "cpu").vector() == pytest.approx(totals, rel=1e-5)
    assert score(model, [whole, filler], "cpu").vector() == pytest.approx(totals, rel=1e-9)
    assert score(model, [filler], "cpu") == Totals.zeros(config.states)
    assert score(model, [whole, padded], "cpu").vector() == pytest.approx([2 * one for one in totals], rel=1e-5)


@torch.no_grad()
def test_means_are_those_of_the_log_probabilities(config):
    model = build_model(config, VOCABULARY, seed=2).eval()
    batch = batch_of(config, [6, 9, 4, 7])
    is_masked = torch.from_numpy(batch.is_masked)
    result = model(Stream.from_batch(batch).replace(predict=True))
    masks = result.by_target(is_masked, False)
    values = Totals.of(evaluation_sums(result, is_masked).tolist()).means()
    tokens = int(is_masked.sum())
    every = single_log_probs(result)[masks], joint_log_probs(result, masks)
    single, joint = (float(log_probs.double().sum()) for log_probs in every)
    assert values["tokens"] == tokens and values["invalid"] == 0
    assert values["nll"] == pytest.approx(-single / tokens) and values["perplexity"] == pytest.approx(
        math.exp(values["nll"])
    )
    assert values["joint_nll"] == pytest.approx(-joint / tokens)
    assert values["coupling"] == pytest.approx((joint - single) / tokens, abs=1e-6)
    assert values["objective_nll"] == pytest.approx(-float(result.log_likelihood.sum()) / int(batch.cu_targets[-1]))
    if config.objective == "mlm":
        assert values["joint_nll"] == pytest.approx(values["nll"]) and values["coupling"] == pytest.approx(0, abs=1e-6)
        assert values["objective_nll"] == pytest.approx(values["nll"])


@torch.no_grad()
def test_a_sequence_without_a_likelihood_is_counted_and_spoils_the_joint(config):
    model = build_model(config, VOCABULARY, seed=2).eval()
    batch = batch_of(config, [6, 9])
    result = model(Stream.from_batch(batch).replace(predict=True))
    broken = result.log_likelihood.clone()
    broken[0] = -math.inf
    sums = evaluation_sums(result.replace(log_likelihood=broken), torch.from_numpy(batch.is_masked))
    values = Totals.of(sums.tolist()).means()
    assert values["invalid"] == 0.5 and values["joint_nll"] == math.inf and values["coupling"] == -math.inf
    of_the_other = -float(result.log_likelihood[1]) / int(result.num_targets[1])
    assert values["objective_nll"] == pytest.approx(of_the_other)
