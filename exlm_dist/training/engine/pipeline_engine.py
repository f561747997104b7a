"""The engine of a run whose layers are cut into pipeline stages."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from exlm_dist.config import RunConfig
from exlm_dist.config.phases import masking_of
from exlm_dist.config.ratios import largest_ratio
from exlm_dist.data.batch import PackedBatch
from exlm_dist.launch import heartbeat
from exlm_dist.model.build import run_layers
from exlm_dist.model.objective import loss_sum, masked_scores
from exlm_dist.model.scoring import Totals, evaluation_sums
from exlm_dist.model.stages import cut_layers, described, layer_costs
from exlm_dist.model.stream import Stream
from exlm_dist.parallel.process import Process
from exlm_dist.training.engine.base import BatchResult, Check, Engine, build_local_model
from exlm_dist.training.engine.deepspeed_config import working_dtype
from exlm_dist.training.engine.quiet_deepspeed import quiet_deepspeed
from exlm_dist.training.engine.training_module import Scoring
from exlm_dist.utils.logs import get_logger

logger = get_logger(__name__)
#: (input, labels) of each micro-batch, as DeepSpeed asks for them on the first and on the last stage.
NOTHING_LOADED = itertools.repeat(((), ()))


class MicroResult(NamedTuple):
    """What the last stage makes of a micro-batch, as `training_module.Objective.forward` gives it."""

    loss: Tensor
    left_out: Tensor
    scores: Tensor | None


class StageWork:
    """What this rank does with each micro-batch that DeepSpeed brings to it: run its layers, on the last stage compute
    the loss too.

    Every stage has the micro-batches from its own loader, so that only the hidden states are sent, and their sizes are
    known. They arrive in the order of the list.
    """

    def __init__(self, config: RunConfig, dtype: torch.dtype, *, last: bool) -> None:
        """`dtype`: of the hidden states."""
        self._config, self._dtype, self._last = config, dtype, last
        #: Under sequence parallelism each tensor rank has a slice of the rows, which are padded to be divisible.
        self._slices = config.parallel.tensor if config.parallel.sequence else 1
        self.begin([], [], 1.0, recompute=False)

    def begin(
        self,
        streams: Iterable[Stream],
        is_masked: Sequence[Tensor | None],
        scale: float,
        *,
        recompute: bool,
        scoring: Scoring = masked_scores,
    ) -> None:
        """Before a pass over micro-batches, `streams`. `is_masked`: [N] of each on the last stage, None: not scored;
        `scale`: factor of the loss for DeepSpeed; `recompute`: activations of the blocks in the backward pass;
        `scoring`: what gives the scores."""
        self._streams = iter(streams)
        self._received: deque[Stream] = deque()  # those whose hidden states are here, or on the way
        self._is_masked, self._scale, self._recompute, self._scoring = is_masked, scale, recompute, scoring
        self.results: list[MicroResult] = []  # on the last stage

    def expected(self) -> tuple[Sequence[int], torch.dtype]:
        """Shape and type of the hidden states that come next."""
        stream = next(self._streams).aligned(self._slices)
        self._received.append(stream)
        return (len(stream.input_ids) // self._slices, self._config.model.width), self._dtype

    def __call__(self, layers: Sequence[nn.Module], hidden: Any) -> Tensor:
        """The hidden states for the next stage; on the last one the scaled loss. `hidden`: those received."""
        heartbeat.alive()
        stream = self._received.popleft().replace(hidden=hidden) if self._received else next(self._streams)
        stream = run_layers(layers, stream, recompute=self._recompute)
        if not self._last:
            assert stream.hidden is not None
            return stream.hidden.contiguous()
        loss, left_out = loss_sum(stream, self._config.loss.reduction)
        is_masked = self._is_masked[len(self.results)]
        scores = None if is_masked is None else self._scoring(stream, is_masked)
        self.results.append(MicroResult(loss.detach(), left_out, scores))
        return loss * self._scale


class PipelineEngine(Engine):
    """Every rank runs the layers of its stage; DeepSpeed moves the micro-batches through the stages (1F1B)."""

    def __init__(self, config: RunConfig, process: Process, vocab_size: int, length: float, *, drawn: bool) -> None:
        """`length`: mean tokens of a sequence, for the costs by which the layers are cut; `drawn`: with initial
        weights, else it is to be filled from a checkpoint."""
        pipeline = process.grid.pipeline
        masking = masking_of(config)
        ratio = largest_ratio(masking.ratio, masking.schedule)
        costs = layer_costs(config.model, vocab_size, length, ratio)
        bounds = cut_layers(costs, pipeline.size)
        logger.info("stages: %s", described(bounds, costs))
        model = build_local_model(config, process, vocab_size, bounds[pipeline.rank], drawn=drawn)
        parameters = model.sharded_parameters()
        work = StageWork(config, working_dtype(config, process.device), last=pipeline.is_last)
        with quiet_deepspeed() as deepspeed:
            deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
            from exlm_dist.parallel.pipeline import Stages, send_no_descriptions  # imports DeepSpeed

            stages = Stages(model.all_layers, bounds, process.grid, work, tied=config.model.tie_head)
        super().__init__(config, process, stages, parameters)
        send_no_descriptions(self.deepspeed, work.expected)
        self._work = work

    def train(
        self, batches: Sequence[PackedBatch], denominator: float, *, scored: bool, check: Check | None = None
    ) -> BatchResult:
        """See `Engine.train`."""
        assert check is None, "config.layouts refuses launch.recheck with stages"
        masked = [scored and batch is batches[-1] for batch in batches]
        # DeepSpeed divides by its accumulation and averages over the replicas; both are undone.
        scale = self.process.grid.data.size * self.accumulation / denominator
        self._work.begin(
            self._streams(batches, masked),
            self._masked_positions(batches, masked),
            scale,
            recompute=self.config.parallel.activation_checkpointing,
        )
        self.deepspeed.micro_batches = len(batches)
        self.deepspeed.train_batch(NOTHING_LOADED)
        self.deepspeed.timers("train_batch").reset()  # it would keep the time, on a GPU two events, of every step
        norm = self.deepspeed.get_global_grad_norm()
        if not self.process.grid.reports_metrics:
            zero = torch.zeros((), dtype=torch.float64, device=self.process.device)
            none_left_out = [torch.zeros(batch.num_sequences, dtype=torch.bool) for batch in batches]
            return BatchResult(zero, none_left_out, None, norm)
        results = self._work.results
        total = torch.stack([result.loss for result in results]).double().sum() / denominator
        return BatchResult(total, [result.left_out for result in results], results[-1].scores, norm)

    def evaluate(self, batches: Iterable[PackedBatch]) -> Totals:
        """See `Engine.evaluate`."""
        every = list(batches)
        masked = [True] * len(every)
        streams, positions = self._streams(every, masked), self._masked_positions(every, masked)
        self._work.begin(streams, positions, 1.0, recompute=False, scoring=evaluation_sums)
        self.deepspeed.eval_batch(NOTHING_LOADED, reduce_output=None, bcast_loss=False, num_micro_batches=len(every))
        if not self.process.grid.reports_metrics:
            return Totals.zeros(self.config.model.states)
        scores = [result.scores for result in self._work.results if result.scores is not None]
        return Totals.of(torch.stack(scores).sum(0).tolist())

    def _masked_positions(self, batches: Sequence[PackedBatch], wanted: Sequence[bool]) -> list[Tensor | None]:
        """`is_masked` of the micro-batches to be scored, on the device of the last stage."""
        if not self.process.grid.pipeline.is_last:
            return []
        return [
            torch.from_numpy(batch.is_masked).to(self.process.device) if wants else None
            for batch, wants in zip(batches, wanted)
        ]

    def _streams(self, batches: Sequence[PackedBatch], masked: Sequence[bool]) -> Iterator[Stream]:
        """The micro-batches on the device, when their turn comes."""
        for batch, wanted in zip(batches, masked):
            yield self.stream(batch).replace(predict=wanted)
