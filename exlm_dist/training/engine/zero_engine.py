"""The engine of a run without pipeline stages: every rank runs all layers, at ZeRO 0 to 3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from exlm_dist.config import RunConfig
from exlm_dist.data.batch import PackedBatch
from exlm_dist.launch import heartbeat
from exlm_dist.model.scoring import Totals, evaluation_sums
from exlm_dist.model.stream import Stream
from exlm_dist.parallel.process import Process
from exlm_dist.parallel.process_groups import Mpu
from exlm_dist.training.engine.base import BatchResult, Check, Engine, build_local_model
from exlm_dist.training.engine.digest import GradientDigest
from exlm_dist.training.engine.training_module import Objective


class ZeroEngine(Engine):
    """Data parallelism with ZeRO 0 to 3, alone or with tensor parallelism."""

    def __init__(self, config: RunConfig, process: Process, vocab_size: int, *, drawn: bool) -> None:
        """`drawn`: with initial weights, else it is to be filled from a checkpoint."""
        model = build_local_model(config, process, vocab_size, drawn=drawn)
        parameters = model.sharded_parameters()
        module = Objective(model, config.loss.reduction, partitioned=config.parallel.zero == 3)
        grid = process.grid
        replicas = grid.layout.group_of(process.rank, "data")
        super().__init__(
            config, process, module, parameters, **({"mpu": Mpu(grid, replicas)} if grid.tensor.size > 1 else {})
        )

    def train(
        self, batches: Sequence[PackedBatch], denominator: float, *, scored: bool, check: Check | None = None
    ) -> BatchResult:
        """See `Engine.train`."""
        device = self.process.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        invalid, scores = [], None
        digest = GradientDigest([sharded.parameter for sharded in self.parameters])
        for batch in batches:
            last = batch is batches[-1]
            is_masked = torch.from_numpy(batch.is_masked).to(device) if scored and last else None
            heartbeat.alive()
            self.deepspeed.set_gradient_accumulation_boundary(last)
            loss_sum, left_out, scores = self.deepspeed(self.stream(batch), is_masked)
            loss = loss_sum / denominator
            # DeepSpeed averages over the replicas, which is undone here; it is told not to divide by the accumulation.
            with digest.of(loss) if check is not None and batch is batches[0] else contextlib.nullcontext():
                self.deepspeed.backward(loss * self.process.grid.data.size, scale_wrt_gas=False)
            total += loss.detach()
            invalid.append(left_out)
        if check is not None:
            check(digest.value())
        norm = self._step()
        if self.process.grid.reports_metrics:
            return BatchResult(total, invalid, scores, norm)
        return BatchResult(torch.zeros_like(total), [torch.zeros_like(mask) for mask in invalid], None, norm)

    def digest(self, batch: PackedBatch, denominator: float, *, scored: bool) -> int:
        """The digest that `train` gives to its check for a step that begins with `batch`, computed without a trace. A
        collective of the ranks of a replica, at ZeRO 3 of all."""
        from deepspeed.runtime.base_optimizer import ZeROOptimizer

        is_masked = torch.from_numpy(batch.is_masked).to(self.process.device) if scored else None
        heartbeat.alive()
        loss_sum, _, _ = self.deepspeed.module(self.stream(batch), is_masked)
        loss = loss_sum / denominator
        parameters = [sharded.parameter for sharded in self.parameters]
        digest = GradientDigest(parameters, discard=True)
        total = loss * self.process.grid.data.size
        if isinstance(self.deepspeed.optimizer, ZeROOptimizer):
            total = self.deepspeed.optimizer.scale_if_loss(total)  # as `backward` does
        with digest.of(loss):
            torch.autograd.grad(total, parameters, allow_unused=True)
        return digest.value()

    def _step(self) -> torch.Tensor | float:
        """Clip and update; the norm of the global gradient before clipping."""
        norm = None
        if self.zero == 0 and self.dtype == torch.float32:  # DeepSpeed keeps no norm here
            norm = self._norm()
        self.deepspeed.step()
        return self.deepspeed.get_global_grad_norm() if norm is None else norm

    def _norm(self) -> torch.Tensor:
        """Norm of the gradient. Parameters that are the same on all tensor-parallel ranks count on the first."""
        tensor = self.process.grid.tensor
        counted = [sharded.parameter for sharded in self.parameters if sharded.slice is not None or tensor.is_first]
        gradients = [parameter.grad for parameter in counted if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if tensor.size > 1:
            square = norm * norm
            dist.all_reduce(square, group=tensor.group)
            norm = square.sqrt()
        return norm

    def evaluate(self, batches: Iterable[PackedBatch]) -> Totals:
        """See `Engine.evaluate`. Through DeepSpeed, which at ZeRO 3 gathers the weights of a layer when it runs."""
        sums = []
        self.deepspeed.eval()
        with torch.no_grad():
            for batch in batches:
                stream = Stream.from_batch(batch, self.process.device)
                is_masked = torch.from_numpy(batch.is_masked).to(self.process.device)
                _, _, scores = self.deepspeed(stream, is_masked, evaluation_sums)
                sums.append(scores)
        self.deepspeed.train()
        if not self.process.grid.reports_metrics:
            return Totals.zeros(self.config.model.states)
        return Totals.of(torch.stack(sums).sum(0).tolist())
