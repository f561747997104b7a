"""Traffic of a rank: sums that can be computed by hand, and how it changes with the layout."""

from __future__ import annotations

import pytest
from unit.planning.test_memory import WIDE, job

from exlm_dist.planning.communication import Traffic, bubble, traffic_of_stage, worst_traffic
from exlm_dist.planning.job import parameters_of_stage


def sent(job_, group: str) -> float:
    return sum(traffic.sent for traffic in worst_traffic(job_) if traffic.group == group)


def test_bubble_by_counting_a_schedule():
    """All stages equally slow, forward and backward: a stage works in m of m + p - 1 slots."""
    for stages in (1, 2, 4):
        for micro_batches in (1, 3, 8):
            slots = max(stage + batch for stage in range(stages) for batch in range(micro_batches)) + 1
            assert bubble(stages, micro_batches) == pytest.approx(1 - micro_batches / slots)


def test_what_leaves_a_rank_in_a_ring():
    assert Traffic("data", "all_reduce", "x", 1, 100.0, 4).sent == 150
    assert Traffic("data", "all_gather", "x", 1, 100.0, 4).sent == 75
    assert Traffic("pipeline", "send", "x", 1, 100.0, 2).sent == 100


def test_one_rank_sends_nothing():
    assert worst_traffic(job()) == []


def test_gradients_and_weights_of_data_parallelism():
    for zero, passes in ((0, 2 * 2), (1, 2 * 4 + 2), (2, 3 * 2 * 4 + 2), (3, 3 * (2 * 2 + 4))):
        this = job(data=8, zero=zero, accumulation=3, model={**WIDE, "tie_head": False})
        count = sum(parameters_of_stage(this, this.stages[0]).values())
        assert sent(this, "data") == pytest.approx(7 / 8 * passes * count)


def test_sequence_parallelism_sends_as_much_in_other_collectives_and_recomputation_more():
    plain, along = (job(tensor=4, sequence=sequence) for sequence in (False, True))
    # 4 all-reduces of all tokens per block become 6 all-gathers and 4 reduce-scatters, half an all-reduce each.
    ratio = sent(along, "tensor") / sent(plain, "tensor")
    assert 1.2 < ratio < 1.3
    assert sent(job(tensor=4, activation_checkpointing=True), "tensor") > 1.2 * sent(plain, "tensor")


def test_a_pipeline_sends_hidden_states_forward_and_gradients_back():
    this = job(pipeline=4, accumulation=6)
    hidden = this.tokens * WIDE["width"] * 2
    found = {stage.index: traffic_of_stage(this, stage) for stage in this.stages}
    payload = {
        (index, t.what): t.payload for index, all_ in found.items() for t in all_ if t.group == "pipeline"
    }  # fmt: skip
    assert payload[0, "hidden states"] == payload[3, "gradients"] == 6 * hidden
    assert (3, "hidden states") not in payload and (0, "gradients") not in payload
    assert payload[0, "tied matrix"] == payload[3, "tied matrix"] and (1, "tied matrix") not in payload
