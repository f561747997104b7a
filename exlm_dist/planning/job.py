"""A run on a number of ranks, with the sizes from which memory, traffic and time are computed. No torch.

Letters: T tokens and S states of a micro-batch (bucket padding included), B sequences in it, N and L the most targets
and states of a sequence, D width, F feed-forward width, H heads, V vocabulary; t, p and d the degrees of tensor,
pipeline and data parallelism, m micro-batches per rank and step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

from exlm_dist.config import RunConfig, data_degree
from exlm_dist.config.phases import masking_of
from exlm_dist.config.ratios import largest_ratio
from exlm_dist.config.schema import ModelConfig
from exlm_dist.model.cost import Sizes, expected_masked, learns_transitions, part_sizes
from exlm_dist.model.stages import cut_layers, layer_costs

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Job:
    """`config` on `world` ranks, for sequences of `length` tokens; `gpu`: Triton kernels, and bf16 if dtype is auto.

    ConfigError, on first use of the degrees, if the layout does not fit the ranks.
    """

    config: RunConfig
    vocab_size: int
    length: int
    world: int
    gpu: bool = False

    @property
    def model(self) -> ModelConfig:
        """Architecture."""
        return self.config.model

    @property
    def tensor(self) -> int:
        """t, the tensor-parallel degree."""
        return self.config.parallel.tensor

    @property
    def pipeline(self) -> int:
        """p, the number of pipeline stages."""
        return self.config.parallel.pipeline

    @cached_property
    def data(self) -> int:
        """d, the number of data-parallel replicas."""
        return data_degree(self.config.parallel, self.world)

    @property
    def along_tokens(self) -> int:
        """Parts into which sequence parallelism splits the tokens outside the tensor-parallel layers (1 without it)."""
        return self.tensor if self.config.parallel.sequence else 1

    @property
    def accumulation(self) -> int:
        """m, the micro-batches per rank and step."""
        return max(1, self.config.batch.sequences // (self.config.batch.micro * self.data))

    @property
    def element(self) -> int:
        """Bytes per element of weights and activations."""
        dtype = self.config.precision.dtype
        return FP32 if dtype == "fp32" or (dtype == "auto" and not self.gpu) else 2

    @property
    def ratio(self) -> float:
        """The masking ratio of the steps with the most masks."""
        masking = masking_of(self.config)
        return largest_ratio(masking.ratio, masking.schedule)

    @cached_property
    def sizes(self) -> Sizes:
        """Expected sizes of one sequence."""
        return Sizes.of(self.model, self.length, expected_masked(self.length, self.ratio))

    @cached_property
    def tokens(self) -> float:
        """T, the tokens of a micro-batch."""
        return self._padded(self.sizes.expanded)

    @cached_property
    def states(self) -> float:
        """S, the states of a micro-batch."""
        return self._padded(self.sizes.states)

    @cached_property
    def longest(self) -> tuple[int, int]:
        """(N, L), to which the sequences of a micro-batch are padded: the expected targets, rounded up."""
        targets = math.ceil(self.sizes.targets)
        return targets, self.model.states * targets

    @property
    def pairs(self) -> float:
        """Scores of the targets at the states, B N L."""
        targets, states = self.longest
        return self.config.batch.micro * targets * states

    @property
    def transitions(self) -> float:
        """Transition scores between the states, B L L."""
        return self.config.batch.micro * self.longest[1] ** 2

    @property
    def vocabulary(self) -> int:
        """Rows of the vocabulary on a tensor-parallel rank, padding included."""
        return -(-self.vocab_size // self.tensor)

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.model.width // self.model.heads

    def _padded(self, per_sequence: float) -> float:
        size, bucket = per_sequence * self.config.batch.micro, self.config.data.bucket
        return size if bucket == 1 else -(-size // bucket) * bucket

    @cached_property
    def stages(self) -> list[Stage]:
        """The layers of each pipeline stage."""
        cut = _cut(self.model, self.vocab_size, self.length, self.ratio, self.pipeline)
        last = self.model.layers + 2
        return [
            Stage(i, sum(1 <= layer <= self.model.layers for layer in layers), 0 in layers, last in layers, len(cut))
            for i, layers in enumerate(cut)
        ]


@cache
def _cut(model: ModelConfig, vocab_size: int, length: int, ratio: float, stages: int) -> list[range]:
    return cut_layers(layer_costs(model, vocab_size, length, ratio), stages)


@dataclass(frozen=True)
class Stage:
    """One of `count` pipeline stages: `blocks` blocks, the embedding if first, norm and output layer if last."""

    index: int
    blocks: int
    first: bool
    last: bool
    count: int

    def in_flight(self, micro_batches: int) -> int:
        """Micro-batches whose activations the stage keeps at once under 1F1B: one for itself and each later stage."""
        return min(self.count - self.index, micro_batches)


def parameters_of_stage(job: Job, stage: Stage) -> dict[str, int]:
    """Parameters on a rank of this stage, by part; the copy of a tied matrix on the last stage counts there."""
    numel = {part: size.numel(job.tensor, job.vocabulary) for part, size in part_sizes(job.model).items()}
    parts = {"blocks": stage.blocks * numel["blocks"]}
    if stage.first:
        parts["embedding"] = numel["embedding"]
    if stage.last:
        parts |= {part: numel[part] for part in ("norm", "token head", "transition head") if part in numel}
        if job.model.tie_head and not stage.first:
            parts["token head"] += numel["embedding"]
    return parts


def largest_tensor(job: Job, stage: Stage) -> int:
    """Elements of the largest parameter on a rank of this stage."""
    model, tensor = job.model, job.tensor
    sizes = [model.width * max(3 * model.width, model.ffn) // tensor]
    if stage.first or stage.last:
        sizes.append(job.vocabulary * model.width)
    if stage.last and learns_transitions(model) and model.transition_positions:
        sizes += [model.max_positions * model.width, 2 * model.width * model.width // tensor]
    return max(sizes)
