"""What the step, the session and the checkpoints see of a run's DeepSpeed engine, whatever the layout."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from exlm_dist.config import RunConfig
from exlm_dist.data.batch import PackedBatch
from exlm_dist.model.build import LanguageModel, build_model
from exlm_dist.model.scoring import Totals
from exlm_dist.model.stream import Stream
from exlm_dist.parallel.process import Process
from exlm_dist.parallel.sharded import ShardedParameter
from exlm_dist.training.engine.deepspeed_config import adamw_options, deepspeed_config, working_dtype
from exlm_dist.training.engine.quiet_deepspeed import quiet_deepspeed
from exlm_dist.utils.seeding import seed_from

#: Bytes that vectorised loads ask the address of a tensor to be a multiple of.
ALIGNMENT = 16
#: Called on every rank before the optimizer's update with its `digest.GradientDigest.value()`.
Check = Callable[[int], None]


@dataclass(frozen=True)
class BatchResult:
    """What `Engine.train` leaves to be reported. Tensors stay on the device: reading them waits for it."""

    loss: torch.Tensor  # 0-dim fp64; the sum over all ranks is the loss of the global batch
    invalid: list[torch.Tensor]  # per micro-batch: left out [B] bool; the sum over all ranks counts each once
    scores: torch.Tensor | None  # [nll sum, correct, count] over the masked tokens of the last micro-batch
    grad_norm: torch.Tensor | float  # of the global gradient before clipping


class Engine(ABC):
    """A model, its optimizer and the DeepSpeed engine that trains it, on this rank."""

    def __init__(
        self,
        config: RunConfig,
        process: Process,
        module: nn.Module,
        parameters: list[ShardedParameter],
        **deepspeed_arguments: Any,
    ) -> None:
        """Make optimizer and DeepSpeed engine for `module`, whose parameters are `parameters`: the same ones in the
        same order on every replica, with their shapes of before ZeRO 3 empties the tensors. A collective.

        `deepspeed_arguments`: of `deepspeed.initialize`. ConfigError for a precision that the device does not have.
        """
        self.config, self.process, self.parameters = config, process, parameters
        self.dtype = working_dtype(config, process.device)
        self.zero = config.parallel.zero
        self.accumulation = config.batch.sequences // (config.batch.micro * process.grid.data.size)
        self.num_parameters = self._count_parameters()
        local = [sharded.parameter for sharded in parameters]
        if self.zero in (1, 2):  # the others have no common buffer that the model computes with
            local = aligned_order(local, self.dtype)
        self.optimizer = torch.optim.AdamW(local, **adamw_options(config, process.device))
        numel = sum(parameter.numel() for parameter in local)
        with quiet_deepspeed() as deepspeed:
            self.deepspeed, *_ = deepspeed.initialize(
                model=module,
                optimizer=self.optimizer,
                config=deepspeed_config(config, process, self.dtype, numel),
                dist_init_required=False,
                **deepspeed_arguments,
            )
        # DeepSpeed's 16-bit wrapper (ZeRO 0) has taken a step on zero gradients. At rate 0 that has changed nothing but
        # the step count.
        for state in self.inner_optimizer.state.values():
            state["step"].zero_()

    def _count_parameters(self) -> int:
        """Parameters of the whole model, tied ones counted once. A collective."""
        grid = self.process.grid
        # The shapes are those of the whole parameters: the first tensor-parallel rank counts for all.
        counts = grid.data.is_first and grid.tensor.is_first
        local = sum(sharded.numel for sharded in self.parameters if sharded.saved) if counts else 0
        return int(self.process.all_gather([float(local)]).sum())

    @property
    def replica(self) -> tuple[int, int]:
        """(index, count) of this data-parallel replica."""
        return self.process.grid.data.rank, self.process.grid.data.size

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer that has the state, below DeepSpeed's wrapper if there is one."""
        wrapper = self.deepspeed.optimizer
        return wrapper if wrapper is self.optimizer else wrapper.optimizer

    def set_learning_rate(self, rate: float) -> None:
        """Rate of the next optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @abstractmethod
    def train(
        self, batches: Sequence[PackedBatch], denominator: float, *, scored: bool, check: Check | None = None
    ) -> BatchResult:
        """One optimizer step on this rank's micro-batches, the loss divided by the global `denominator`.

        `scored`: also measure nll and accuracy on the last one, under the dropout of training. `check` is called with
        the digest of loss and gradients of the first one; where it raises, no weight has changed.
        """

    @abstractmethod
    def evaluate(self, batches: Iterable[PackedBatch]) -> Totals:
        """Sums of the comparable metric over `batches` of this rank; their sum over all ranks is the total. All ranks
        must call it, with equally many batches."""

    def prime(self, batches: Sequence[PackedBatch]) -> None:
        """One optimizer step that changes no weight, so that there are moments to overwrite with saved ones. Step count
        and loss scale must be overwritten too. The gradient of the first of `batches` times 0, at rate 0."""
        self.set_learning_rate(0.0)
        self.train(batches[:1], math.inf, scored=False)

    def stream(self, batch: PackedBatch) -> Stream:
        """A micro-batch with the key of its dropout masks: a pure function of the seed and its index in the run."""
        key = seed_from(self.config.seed, "dropout", batch.step, batch.index)
        return Stream.from_batch(batch, self.process.device, dropout_seed=key)

    def close(self) -> None:
        """Remove DeepSpeed's hooks."""
        self.deepspeed.destroy()


def aligned_order(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> list[nn.Parameter]:
    """The order in which DeepSpeed lays `parameters` end to end in one buffer of `dtype`: those whose bytes are no
    multiple of ALIGNMENT at the end, the largest first. None that stood behind one of them would be aligned, and matrix
    products and kernels would have to take their slow paths."""

    def place(parameter: nn.Parameter) -> tuple[bool, int]:
        odd = parameter.numel() * dtype.itemsize % ALIGNMENT != 0
        return odd, -parameter.numel() if odd else 0

    return sorted(parameters, key=place)


def build_local_model(
    config: RunConfig, process: Process, vocab_size: int, stage: range | None = None, *, drawn: bool = True
) -> LanguageModel:
    """The part of the model on this rank; `stage`: indices of its layers, None: all. `drawn`: with its initial weights,
    else it is to be filled from a checkpoint."""
    shard = None
    if process.grid.tensor.size > 1:
        from exlm_dist.parallel import tensor  # megatron takes more than a second to import

        group, sequence = process.grid.tensor.group, config.parallel.sequence
        shard = functools.partial(tensor.apply_tensor_parallel, group=group, sequence=sequence)
    return build_model(
        config.model,
        vocab_size,
        seed=config.seed if drawn else None,
        kernel_backend=config.kernels.backend,
        activation_checkpointing=config.parallel.activation_checkpointing,
        stage=stage,
        shard=shard,
        device=process.device,
        dtype=working_dtype(config, process.device),
    )
