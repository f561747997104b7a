"""The engine of a run whose layers are cut into pipeline stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from exlm_dist.config import RunConfig
from exlm_dist.data.batch import PackedBatch
from exlm_dist.launch import heartbeat
from exlm_dist.model.build import run_layers
from exlm_dist.model.objective import loss_sum, masked_scores
from exlm_dist.model.scoring import Totals
from exlm_dist.model.stages import cut_layers, described, layer_costs
from exlm_dist.model.stream import Stream
from exlm_dist.parallel.process import Process
from exlm_dist.training.engine.base import BatchResult, Engine, quiet_deepspeed
from exlm_dist.utils.logs import get_logger

logger = get_logger(__name__)


class PipelineEngine(Engine):
    """Every rank runs the layers of its stage; DeepSpeed moves the micro-batches through the stages (1F1B).

    The micro-batches enter at the first stage. The last one, which has the same micro-batches from its own loader,
    needs only their masked places and takes them in the order in which they arrive, the order of the list.
    """

    def __init__(self, config: RunConfig, process: Process, vocab_size: int, length: float) -> None:
        """`length`: mean tokens of a sequence, for the costs by which the layers are cut."""
        super().__init__(config, process, vocab_size)
        grid = process.grid
        costs = layer_costs(config.model, vocab_size, length, config.masking.ratio)
        self.bounds = cut_layers(costs, grid.pipeline.size)
        logger.info("stages: %s", described(self.bounds, costs))
        model = self.build(self.bounds[grid.pipeline.rank])
        self.parameters = model.sharded_parameters()
        self._recompute = config.parallel.activation_checkpointing
        self._scale = 0.0
        self._is_masked: list[Tensor | None] = []
        self._done: list[tuple[Tensor, Tensor, Tensor | None]] = []
        with quiet_deepspeed() as deepspeed:
            deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)
            from exlm_dist.parallel.pipeline import Stages

            self._stages = Stages(model.places, self.bounds, grid, self._work, tied=config.model.tie_head)
        self.start(self._stages)

    def train(self, batches: Sequence[PackedBatch], denominator: float, *, scored: bool) -> BatchResult:
        """See `Engine.train`."""
        masked = [scored and batch is batches[-1] for batch in batches]
        # DeepSpeed divides by its accumulation and averages over the copies; both are undone.
        self._begin(batches, masked, self.process.grid.data.size * self.accumulation / denominator)
        self.deepspeed.micro_batches = len(batches)
        self.deepspeed.train_batch(self._load(batches, masked))
        self.deepspeed.timers("train_batch").reset()  # it would keep the time, on a GPU two events, of every step
        norm = self.deepspeed.get_global_grad_norm()
        if not self.process.grid.reports_metrics:
            zero = torch.zeros((), dtype=torch.float64, device=self.process.device)
            nobody = [torch.zeros(batch.num_sequences, dtype=torch.bool) for batch in batches]
            return BatchResult(zero, nobody, None, norm)
        total = torch.stack([loss for loss, _, _ in self._done]).double().sum() / denominator
        return BatchResult(total, [left_out for _, left_out, _ in self._done], self._done[-1][2], norm)

    def evaluate(self, batches: Iterable[PackedBatch]) -> Totals:
        """See `Engine.evaluate`."""
        every = list(batches)
        masked = [True] * len(every)
        self._begin(every, masked, 1.0)
        self.deepspeed.eval_batch(
            self._load(every, masked), reduce_output=None, bcast_loss=False, num_micro_batches=len(every)
        )
        if not self.process.grid.reports_metrics:
            return Totals(0.0, 0.0, 0.0)
        return Totals(*torch.stack([scores for _, _, scores in self._done]).double().sum(0).tolist())

    def _begin(self, batches: Sequence[PackedBatch], masked: Sequence[bool], scale: float) -> None:
        device = self.process.device
        self._scale, self._done, self._is_masked = scale, [], []
        if self.process.grid.pipeline.is_last:
            self._is_masked = [
                torch.from_numpy(batch.is_masked).to(device) if wanted else None
                for batch, wanted in zip(batches, masked)
            ]

    def _load(
        self, batches: Sequence[PackedBatch], masked: Sequence[bool]
    ) -> Iterator[tuple[tuple[Tensor, ...], tuple[()]]]:
        """(input, labels) of each micro-batch, as DeepSpeed asks for them on the first stage and, in vain, the last."""
        first = self.process.grid.pipeline.is_first
        for batch, wanted in zip(batches, masked):
            yield (self.stream(batch).replace(predict=wanted).to_tensors() if first else ()), ()

    def _work(self, layers: Sequence[nn.Module], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...] | Tensor:
        """This stage on one micro-batch; on the last stage the loss, scaled for DeepSpeed."""
        heartbeat.alive()
        training = self._stages.training
        stream = run_layers(layers, Stream.from_tensors(tensors), recompute=self._recompute and training)
        if not self.process.grid.pipeline.is_last:
            return stream.to_tensors()
        loss, left_out = loss_sum(stream, self.config.loss.reduction)
        is_masked = self._is_masked[len(self._done)]
        scores = None if is_masked is None else masked_scores(stream, is_masked).stacked()
        self._done.append((loss.detach(), left_out, scores))
        return loss * self._scale
