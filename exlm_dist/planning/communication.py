"""What a rank sends in a step, by group and collective, and the bubble of a pipeline: the formulas of
docs/parallelism.md. No torch.

`payload` is what the collectives are called with: the tensor of an all-reduce or a send, the whole of a gathered or
scattered tensor. `sent` is what leaves the rank in a ring algorithm. Scalars that the ranks exchange once a step
(norms, losses, flags) are left out. Letters as in `planning/job.py`; e bytes per element, P parameters of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from exlm_dist.model.cost import learns_transitions
from exlm_dist.planning.job import FP32, Job, Stage, parameters_of_stage

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]
#: Process groups that traffic belongs to.
GROUPS = ("tensor", "pipeline", "data")


@dataclass(frozen=True)
class Traffic:
    """The collectives for one purpose in one step of one rank."""

    group: str  # one of GROUPS
    collective: Collective
    what: str
    calls: int
    payload: float  # bytes, summed over the calls
    ranks: int  # of the group

    @property
    def sent(self) -> float:
        """Bytes that leave this rank."""
        others = (self.ranks - 1) / self.ranks
        return self.payload * {"all_reduce": 2 * others, "send": 1.0}.get(self.collective, others)


def traffic_of_stage(job: Job, stage: Stage) -> list[Traffic]:
    """All that a rank of `stage` sends in a step."""
    return [*_tensor(job, stage), *_pipeline(job, stage), *_data(job, stage)]


def worst_traffic(job: Job) -> list[Traffic]:
    """The traffic of the stage that sends most."""
    return max((traffic_of_stage(job, stage) for stage in job.stages), key=lambda all_: sum(t.sent for t in all_))


def bubble(stages: int, micro_batches: int) -> float:
    """Fraction of a step in which a stage waits: (p - 1) / (m + p - 1) (Narayanan et al. 2021, 1F1B)."""
    return (stages - 1) / (micro_batches + stages - 1)


def _tensor(job: Job, stage: Stage) -> list[Traffic]:
    if job.tensor == 1:
        return []
    calls = _along_tokens(job, stage) if job.config.parallel.sequence else _whole_tokens(job, stage)
    if stage.last:
        calls += _output(job)
    return [
        Traffic("tensor", collective, what, count * job.accumulation, payload * job.accumulation, job.tensor)
        for collective, what, count, payload in calls
        if count
    ]


#: (collective, purpose, calls, bytes) of one micro-batch.
_Calls = list[tuple[Collective, str, int, float]]


def _whole_tokens(job: Job, stage: Stage) -> _Calls:
    """A block sums the outputs of its two row-parallel maps forward and the gradients at the inputs of its two
    column-parallel maps backward; the embedding sums its output."""
    token, state = (rows * job.model.width * job.element for rows in (job.tokens, job.states))
    whole = stage.blocks - stage.last
    again = _sums_repeated(job)
    calls: _Calls = [("all_reduce", "blocks", (4 + again) * whole, (4 + again) * whole * token)]
    if stage.last:
        calls.append(("all_reduce", "last block", 4 + again, token + (3 + again) * state))
    if stage.first:
        calls.append(("all_reduce", "embedding", 1, token))
    return calls


def _sums_repeated(job: Job) -> int:
    """All-reduces of a block that recomputation repeats: it stops at the last tensor that the backward pass needs: one
    before the second all-reduce, unless dropout keeps a mask or a norm follows."""
    if not job.config.parallel.activation_checkpointing:
        return 0
    return 2 if job.model.norm == "post" or (job.model.dropout and not job.gpu) else 1


def _along_tokens(job: Job, stage: Stage) -> _Calls:
    """Sequence parallelism: a column-parallel map gathers its input forward and again backward and scatters its
    gradient; a row-parallel one scatters its output and gathers its gradient. Gradients of norms and biases are summed
    in fp32."""
    token, state = (rows * job.model.width * job.element for rows in (job.tokens, job.states))
    whole, vector = stage.blocks - stage.last, FP32 * job.model.width
    recomputed, again = job.config.parallel.activation_checkpointing, _sums_repeated(job)
    gathers, scatters, vectors = 6 + 2 * recomputed, 4 + again, 6 * stage.blocks + 2 * stage.last
    calls: _Calls = [
        ("all_gather", "blocks", gathers * whole, gathers * whole * token),
        ("reduce_scatter", "blocks", scatters * whole, scatters * whole * token),
        ("all_reduce", "norms and biases", vectors, vectors * vector),
    ]
    if stage.last:
        # Of all tokens: the input of the attention's map, forward and backward, and the rows to take the states from.
        all_tokens = 3 + 2 * recomputed
        of_states = gathers + 1 + recomputed - all_tokens
        calls.append(("all_gather", "last block", all_tokens + of_states, all_tokens * token + of_states * state))
        calls.append(("reduce_scatter", "last block", scatters + 1, 2 * token + (scatters - 1) * state))
        calls.append(("all_gather", "output", 1, state))
    if stage.first:
        calls.append(("reduce_scatter", "embedding", 1, token))
        calls.append(("all_gather", "embedding", 1, token))
    return calls


def _output(job: Job) -> _Calls:
    """Gradients of the features, lse and target scores of the vocabulary, and the mixture of the heads' transitions."""
    state = job.states * job.model.width * job.element
    scores = job.pairs if job.gpu else job.states * job.longest[0]
    calls: _Calls = [
        ("all_reduce", "features", 1, state),
        ("all_reduce", "vocabulary", 3, FP32 * (2 * job.states + scores)),
    ]
    if learns_transitions(job.model):
        calls.append(("all_reduce", "features", 1, state))
        calls.append(
            ("all_reduce", "transitions", 4, 2 * FP32 * (job.transitions + job.config.batch.micro * job.longest[1]))
        )
        if job.model.transition_positions:
            calls.append(("all_reduce", "positions", 1, job.sizes.expanded * job.model.width * job.element))
    return calls


def _pipeline(job: Job, stage: Stage) -> list[Traffic]:
    """Hidden states go forward, gradients of the hidden states go back; the two copies of a tied matrix sum their
    gradients."""
    if job.pipeline == 1:
        return []
    count, hidden = job.accumulation, job.tokens * job.model.width * job.element / job.along_tokens
    found = []
    if not stage.last:
        found.append(Traffic("pipeline", "send", "hidden states", count, count * hidden, 2))
    if not stage.first:
        found.append(Traffic("pipeline", "send", "gradients", count, count * hidden, 2))
    if job.model.tie_head and (stage.first or stage.last):
        table = job.vocabulary * job.model.width * job.element
        found.append(Traffic("pipeline", "all_reduce", "tied matrix", 1, table, 2))
    return found


def _data(job: Job, stage: Stage) -> list[Traffic]:
    """Gradients are averaged and, under ZeRO, updated weights gathered; ZeRO 2 and 3 average in every micro-batch.

    ZeRO 1 and 2 average by all-reduce (DeepSpeed's buckets span ranks). Under ZeRO, bf16 gradients are sent as fp32.
    """
    if job.data == 1:
        return []
    count, zero, repeated = sum(parameters_of_stage(job, stage).values()), job.config.parallel.zero, job.accumulation
    wide, weights = FP32 if zero else job.element, count * job.element
    if zero == 3:
        # In the forward and in the backward pass; a tied matrix once for each layer that uses it.
        tied = job.vocabulary * job.model.width * job.element if job.model.tie_head else 0
        return [
            Traffic("data", "all_gather", "weights", 2 * repeated, 2 * repeated * (weights + tied), job.data),
            Traffic("data", "reduce_scatter", "gradients", repeated, repeated * count * wide, job.data),
        ]
    times = repeated if zero == 2 else 1
    found = [Traffic("data", "all_reduce", "gradients", times, times * count * wide, job.data)]
    if zero:
        found.append(Traffic("data", "all_gather", "weights", 1, weights, job.data))
    return found
