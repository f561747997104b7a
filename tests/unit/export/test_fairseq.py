from __future__ import annotations

import pytest
import torch

from exlm_dist.config.schema import ModelConfig
from exlm_dist.export.fairseq import EMBEDDING, from_fairseq, to_fairseq
from exlm_dist.model.build import build_model
from exlm_dist.tokenizers.tokenizer import MASK
from exlm_dist.utils.errors import CheckpointError

VOCABULARY = 12


def our_weights(**changes):
    config = ModelConfig(layers=2, width=16, heads=2, ffn=20, states=2, max_positions=24, **changes)
    model = build_model(config, VOCABULARY, seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mask_last", [False, True])
@pytest.mark.parametrize("changes", [{}, {"tie_head": False}, {"transition_positions": False}], ids=str)
def test_there_and_back(changes, mask_last):
    ours = our_weights(**changes)
    back = from_fairseq(to_fairseq(ours, mask_last=mask_last), mask_last=mask_last)
    assert back.keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in back.items())


def test_plain_model_needs_the_number_of_heads():
    ours = our_weights(transitions="uniform")
    with pytest.raises(CheckpointError, match="pass heads"):
        to_fairseq(ours)
    back = from_fairseq(to_fairseq(ours, heads=2), heads=2)
    assert all(torch.equal(value, ours[name]) for name, value in back.items())


def test_mask_goes_to_the_end_and_the_others_keep_their_order():
    ours = our_weights()
    theirs = to_fairseq(ours, mask_last=True)
    rows = ours["embedding.weight"]
    assert torch.equal(theirs[EMBEDDING], torch.cat([rows[:MASK], rows[MASK + 1 :], rows[MASK : MASK + 1]]))
    assert torch.equal(theirs["encoder.lm_head.weight"], theirs[EMBEDDING])
    assert theirs["encoder.lm_head.bias"][-1] == ours["output.bias"][MASK]


def test_unknown_entries_are_named_and_buffers_left_out():
    theirs = to_fairseq(our_weights())
    theirs["encoder.sentence_encoder.version"] = torch.zeros(1)
    theirs["encoder.sentence_encoder.layers.0.self_attn.rot_emb.inv_freq"] = torch.zeros(2)
    theirs["classification_heads.x.dense.weight"] = torch.zeros(2, 2)
    assert "embedding.weight" in from_fairseq(theirs)
    theirs["encoder.sentence_encoder.embed_positions.weight"] = torch.zeros(3, 2)
    with pytest.raises(CheckpointError, match="embed_positions"):
        from_fairseq(theirs)


def test_a_projection_that_is_missing_is_named():
    theirs = to_fairseq(our_weights())
    del theirs["encoder.sentence_encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointError, match="no k_proj.bias of layer 1"):
        from_fairseq(theirs)
