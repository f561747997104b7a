"""A run configuration as a DeepSpeed engine. The DeepSpeed dictionary is generated here and nowhere else."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from exlm_dist.config import RunConfig
from exlm_dist.data.batch import PackedBatch
from exlm_dist.launch import heartbeat
from exlm_dist.model.build import LanguageModel, build_model
from exlm_dist.model.scoring import Totals, score
from exlm_dist.model.stream import Stream
from exlm_dist.parallel.compiler import decorators_without_compiler
from exlm_dist.parallel.process import Process
from exlm_dist.parallel.process_groups import Mpu
from exlm_dist.parallel.sharded import ShardedParameter
from exlm_dist.training.engine.training_module import Objective
from exlm_dist.utils.errors import ConfigError
from exlm_dist.utils.logs import get_logger
from exlm_dist.utils.seeding import seed_from

#: Elements per communication bucket: large enough for full bandwidth, small enough for a laptop.
BUCKET = 50_000_000
logger = get_logger(__name__)


class Engine:
    """What the step, the session and the checkpoints see of a run's DeepSpeed engine, however the model is spread."""

    deepspeed: Any
    optimizer: torch.optim.Optimizer
    #: Trained numbers of the whole model.
    num_parameters: int
    #: What this rank holds, in the same order on every copy; the shapes are those before ZeRO 3 empties the tensors.
    parameters: list[ShardedParameter]

    def __init__(self, config: RunConfig, process: Process, vocab_size: int) -> None:
        """ConfigError for a precision that the device does not have."""
        self.config, self.process, self.vocab_size = config, process, vocab_size
        self.dtype = working_dtype(config, process.device)
        self.zero = config.parallel.zero
        self.accumulation = config.batch.sequences // (config.batch.micro * process.grid.data.size)

    def build(self, stage: range | None = None) -> LanguageModel:
        """What this rank holds of the model, or of some layers of it, with its initial weights."""
        return build_model(
            self.config.model,
            self.vocab_size,
            seed=self.config.seed,
            kernel_backend=self.config.kernels.backend,
            activation_checkpointing=self.config.parallel.activation_checkpointing,
            stage=stage,
            split=self._split() if self.process.grid.tensor.size > 1 else None,
        )

    def _split(self) -> Callable[[nn.Module], None]:
        from exlm_dist.parallel.tensor import split

        return functools.partial(split, group=self.process.grid.tensor.group, sequence=self.config.parallel.sequence)

    def start(self, module: nn.Module, **arguments: Any) -> None:
        """Make optimizer and DeepSpeed engine for `module`, whose parameters are `parameters`."""
        self.optimizer = torch.optim.AdamW(
            [held.parameter for held in self.parameters], **adamw(self.config, self.process.device)
        )
        self.num_parameters = self._count()
        here = sum(held.parameter.numel() for held in self.parameters)
        settings = deepspeed_config(self.config, self.process, self.dtype, here)
        with quiet_deepspeed() as deepspeed:
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=self.optimizer, config=settings, dist_init_required=False, **arguments
            )
        # DeepSpeed's 16-bit wrapper (ZeRO 0) has taken a step on zero gradients; at rate 0 only its count is to be
        # undone.
        for state in self.inner_optimizer.state.values():
            state["step"].zero_()

    def _count(self) -> int:
        """Trained numbers of the whole model, tied ones counted once. A collective."""
        grid = self.process.grid
        mine = grid.data.is_first and grid.tensor.is_first
        # Shapes are those of the whole: of what is cut along the tensor ranks the first counts all.
        here = sum(held.numel for held in self.parameters if held.saved)
        return int(self.process.all_gather([float(here if mine else 0)]).sum())

    @property
    def replica(self) -> tuple[int, int]:
        """(number, count) of this data-parallel replica."""
        return self.process.grid.data.rank, self.process.grid.data.size

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer that holds the state, below DeepSpeed's wrapper where there is one."""
        wrapper = self.deepspeed.optimizer
        return wrapper if wrapper is self.optimizer else wrapper.optimizer

    def set_learning_rate(self, rate: float) -> None:
        """Rate of the next optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def train(self, batches: Sequence[PackedBatch], denominator: float, *, scored: bool) -> BatchResult:
        """One optimizer step on this rank's micro-batches, the loss divided by the global `denominator`.

        `scored`: also measure nll and accuracy on the last one, under the dropout of training.
        """
        raise NotImplementedError

    def evaluate(self, batches: Iterable[PackedBatch]) -> Totals:
        """Sums of the comparable metric over `batches` of this rank; their sum over all ranks is the total. All ranks
        must call it, with equally many batches."""
        raise NotImplementedError

    def prime(self, batches: Sequence[PackedBatch]) -> None:
        """One optimizer step that changes nothing, so that there are moments to write to; they, the step count and the
        loss scale must be written then. The gradient of the first of `batches` times 0, at rate 0."""
        self.set_learning_rate(0.0)
        self.train(batches[:1], math.inf, scored=False)

    def stream(self, batch: PackedBatch) -> Stream:
        """A micro-batch with the key of its dropout masks: a pure function of the seed and its place in the run."""
        key = seed_from(self.config.seed, "dropout", batch.step, batch.index)
        return Stream.from_batch(batch, self.process.device, dropout_seed=key)

    def close(self) -> None:
        """Take DeepSpeed's hooks away."""
        self.deepspeed.destroy()


@dataclass(frozen=True)
class BatchResult:
    """What an optimizer step leaves to be reported. Tensors stay on the device: reading them waits for it."""

    loss: torch.Tensor  # 0-dim fp64; the sum over all ranks is the loss of the global batch
    invalid: list[torch.Tensor]  # per micro-batch: left out [B] bool; the sum over all ranks counts each once
    scores: torch.Tensor | None  # [nll sum, correct, count] over the masked tokens of the last micro-batch
    grad_norm: torch.Tensor | float  # of the global gradient before clipping


class PlainEngine(Engine):
    """Every rank runs all layers; ZeRO 0 to 3, alone or under tensor parallelism."""

    def __init__(self, config: RunConfig, process: Process, vocab_size: int) -> None:
        super().__init__(config, process, vocab_size)
        self._model = self.build()
        self.parameters = self._model.sharded_parameters()
        objective = Objective(self._model, config.loss.reduction, partitioned=self.zero == 3)
        grid = process.grid
        place = grid.layout.group_of(process.rank, "data")
        self.start(objective, **({"mpu": Mpu(grid, place)} if grid.tensor.size > 1 else {}))

    def train(self, batches: Sequence[PackedBatch], denominator: float, *, scored: bool) -> BatchResult:
        """See `Engine.train`."""
        device = self.process.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        invalid, scores = [], None
        for batch in batches:
            last = batch is batches[-1]
            is_masked = torch.from_numpy(batch.is_masked).to(device) if scored and last else None
            heartbeat.alive()
            self.deepspeed.set_gradient_accumulation_boundary(last)
            loss, left_out, scores = self.deepspeed(self.stream(batch), is_masked)
            # DeepSpeed averages over the copies, which is undone here; it is told not to divide by the accumulation.
            share = loss / denominator
            self.deepspeed.backward(share * self.process.grid.data.size, scale_wrt_gas=False)
            total += share.detach()
            invalid.append(left_out)
        norm = self._step()
        if self.process.grid.reports_metrics:
            return BatchResult(total, invalid, scores, norm)
        return BatchResult(torch.zeros_like(total), [torch.zeros_like(mask) for mask in invalid], None, norm)

    def _step(self) -> torch.Tensor | float:
        """Clip and update; the norm of the global gradient before clipping."""
        norm = None
        if self.zero == 0 and self.dtype == torch.float32:  # DeepSpeed keeps no norm here
            norm = self._norm()
        self.deepspeed.step()
        return self.deepspeed.get_global_grad_norm() if norm is None else norm

    def _norm(self) -> torch.Tensor:
        """Parameters that the tensor ranks have in common are counted on the first."""
        tensor = self.process.grid.tensor
        counted = [held.parameter for held in self.parameters if held.slice is not None or tensor.is_first]
        gradients = [parameter.grad for parameter in counted if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if tensor.size > 1:
            square = norm * norm
            dist.all_reduce(square, group=tensor.group)
            norm = square.sqrt()
        return norm

    def evaluate(self, batches: Iterable[PackedBatch]) -> Totals:
        """See `Engine.evaluate`."""
        with self._plain_model() as model:
            totals = score(model, batches, self.process.device)
        return totals if self.process.grid.reports_metrics else Totals(0.0, 0.0, 0.0)

    @contextlib.contextmanager
    def _plain_model(self) -> Iterator[LanguageModel]:
        """The current weights as an ordinary model without hooks. At ZeRO 3 a copy (in the working precision) for the
        time being."""
        if self.zero < 3:
            yield self._model
            return
        import deepspeed

        copy = self.build().to(self.process.device, self.dtype)
        with torch.no_grad():
            for held, target in zip(self.parameters, copy.parameters()):
                with deepspeed.zero.GatheredParameters([held.parameter]):
                    target.copy_(held.parameter)
        yield copy


def build_engine(config: RunConfig, process: Process, vocab_size: int, length: float) -> Engine:
    """The engine for the layout of `config`; `length`: mean tokens of a sequence, by which layers are cut into
    stages."""
    if process.grid.pipeline.size == 1:
        return PlainEngine(config, process, vocab_size)
    from exlm_dist.training.engine.pipeline_engine import PipelineEngine

    return PipelineEngine(config, process, vocab_size, length)


def working_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """Type of weights and activations; ConfigError where the device does not have the one asked for."""
    wanted = config.precision.dtype
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if wanted == "fp16" and device.type == "cpu":
        raise ConfigError(
            "precision.dtype fp16 is not supported on a CPU (DeepSpeed refuses it). Set precision.dtype fp32 or bf16."
        )
    if wanted == "fp16" and config.parallel.zero == 0:
        raise ConfigError(
            "precision.dtype fp16 needs parallel.zero 1 or higher: at 0 DeepSpeed does not scale the loss. "
            "Set parallel.zero 1."
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]


def adamw(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Arguments of torch.optim.AdamW; the rate is set before every step.

    (Naming AdamW in DeepSpeed's dictionary instead would compile its FusedAdam first, a minute on a CPU.)
    """
    optimizer = config.optimizer
    on_host = device.type == "cpu" or config.parallel.offload
    return {
        "lr": 0.0,
        "betas": (optimizer.beta1, optimizer.beta2),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "fused": None if on_host else True,
    }


def deepspeed_config(config: RunConfig, process: Process, dtype: torch.dtype, num_parameters: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`."""
    bucket = min(BUCKET, -(-num_parameters // 1024) * 1024)
    zero: dict[str, Any] = {
        "stage": config.parallel.zero,
        "overlap_comm": process.device.type == "cuda" and config.parallel.zero > 1,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if config.parallel.zero == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": 4 * bucket}
    if config.parallel.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": process.device.type == "cuda"}
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    result: dict[str, Any] = {
        "train_batch_size": config.batch.sequences,
        "train_micro_batch_size_per_gpu": config.batch.micro,
        "gradient_accumulation_steps": config.batch.sequences // (config.batch.micro * process.grid.data.size),
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if process.grid.pipeline.size > 1:
        # By default activations are split over the tensor ranks and gathered again on the next stage, which takes them
        # to be equal there: silently wrong with sequence parallelism.
        result["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if half:
        result[half] = {"enabled": True}
    if dtype == torch.bfloat16 and config.parallel.zero > 0:
        # Otherwise gradients of the micro-batches, and of the ranks, are summed in 8 bits of mantissa.
        result |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return result


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[ModuleType]:
    """DeepSpeed, imported and used without its noise and without its shared-memory all-reduce."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    # DeepSpeed calls functions that newer versions of torch have renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*")
    # stdout: DeepSpeed prints and asks compilers for their versions; warnings: of packages that are not needed.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _hidden("mlflow"):  # its autotuner would import it: half of the time that all imports of a rank take
            import deepspeed
        import deepspeed.ops
        from deepspeed.utils import logger as noisy

        noisy.setLevel(getattr(logging, os.environ["DEEPSPEED_LOG_LEVEL"].upper(), logging.ERROR))
        # No extension counts as compatible: its shared-memory all-reduce is compiled at start (a minute), and a rank
        # killed meanwhile leaves a lock on which every later process waits for ever. Asking which of them are runs
        # compilers, whose folders a killed rank leaves too.
        deepspeed.ops.__compatible_ops__ = {}
        _import_muon()
        yield deepspeed


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Inside, importing `module` fails, unless it was imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def _import_muon() -> None:
    """DeepSpeed imports its Muon optimizer, which is marked for the compiler, to see that ours is a different one."""
    with decorators_without_compiler():
        try:
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
        except ImportError:
            logger.debug("this version of DeepSpeed has no Muon")
