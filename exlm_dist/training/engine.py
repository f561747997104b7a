"""A run configuration as a DeepSpeed engine. The DeepSpeed dictionary is generated here and nowhere else."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from typing import Any

import torch
from torch import nn

from exlm_dist.config import RunConfig
from exlm_dist.launch import heartbeat
from exlm_dist.model.build import LanguageModel, build_model
from exlm_dist.parallel.process import Process
from exlm_dist.training.objective import Objective
from exlm_dist.utils.errors import ConfigError
from exlm_dist.utils.logs import get_logger

#: Elements per communication bucket: large enough for full bandwidth, small enough for a laptop.
BUCKET = 50_000_000
logger = get_logger(__name__)


class Engine:
    """The DeepSpeed engine of a run, with what DeepSpeed does not keep: canonical names and the torch optimizer."""

    def __init__(self, config: RunConfig, process: Process, vocab_size: int) -> None:
        """Builds model, optimizer and engine; ConfigError for a precision that the device does not have."""
        self.config, self.process, self.vocab_size = config, process, vocab_size
        self.dtype = working_dtype(config, process.device)
        self.zero = config.parallel.zero
        model = self._build()
        #: (canonical name, parameter), in the same order on every rank.
        self.parameters: list[tuple[str, nn.Parameter]] = list(model.named_parameters())
        #: Shapes before ZeRO 3 empties the parameters.
        self.shapes = {name: parameter.shape for name, parameter in self.parameters}
        self.accumulation = config.batch.sequences // (config.batch.micro * process.world)
        objective = Objective(model, config.loss.reduction, partitioned=self.zero == 3)
        self.optimizer = torch.optim.AdamW(
            [parameter for _, parameter in self.parameters], **adamw(config, process.device)
        )
        self._model = model
        self.deepspeed = _initialise(
            objective, self.optimizer, deepspeed_config(config, process, self.dtype, self.num_parameters)
        )
        # DeepSpeed's 16-bit wrapper (ZeRO 0) has taken a step on zero gradients; at rate 0 only its count is to be
        # undone.
        for state in self.inner_optimizer.state.values():
            state["step"].zero_()

    def _build(self) -> LanguageModel:
        return build_model(
            self.config.model,
            self.vocab_size,
            seed=self.config.seed,
            kernel_backend=self.config.kernels.backend,
            activation_checkpointing=self.config.parallel.activation_checkpointing,
        )

    @property
    def num_parameters(self) -> int:
        """Trained numbers, tied ones counted once."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer that holds the state, below DeepSpeed's wrapper where there is one."""
        wrapper = self.deepspeed.optimizer
        return wrapper if wrapper is self.optimizer else wrapper.optimizer

    def set_learning_rate(self, rate: float) -> None:
        """Rate of the next optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def forward(
        self, stream: Any, is_masked: torch.Tensor | None, *, last: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """`Objective.forward`; `last` marks the micro-batch whose backward pass reduces the gradients."""
        heartbeat.beat()
        self.deepspeed.set_gradient_accumulation_boundary(last)
        return self.deepspeed(stream, is_masked)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's `loss`, divided already by the global denominator.

        DeepSpeed averages over the ranks, which is undone here; it is told not to divide by the accumulation.
        """
        self.deepspeed.backward(loss * self.process.world, scale_wrt_gas=False)

    def step(self) -> torch.Tensor | float:
        """Clip and update; returns the norm of the global gradient before clipping."""
        norm = None
        if self.zero == 0 and self.dtype == torch.float32:  # DeepSpeed keeps no norm here
            norm = torch.nn.utils.get_total_norm(
                [parameter.grad for _, parameter in self.parameters if parameter.grad is not None]
            )
        self.deepspeed.step()
        return self.deepspeed.get_global_grad_norm() if norm is None else norm

    @contextlib.contextmanager
    def plain_model(self):
        """The current weights as an ordinary model without hooks. At ZeRO 3 a copy (in the working precision) for the
        time being."""
        if self.zero < 3:
            yield self._model
            return
        import deepspeed

        copy = self._build().to(self.process.device, self.dtype)
        with torch.no_grad():
            for (_, partitioned), target in zip(self.parameters, copy.parameters()):
                with deepspeed.zero.GatheredParameters([partitioned]):
                    target.copy_(partitioned)
        yield copy

    def close(self) -> None:
        """Take DeepSpeed's hooks away."""
        self.deepspeed.destroy()


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
        "gradient_accumulation_steps": config.batch.sequences // (config.batch.micro * process.world),
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if half:
        result[half] = {"enabled": True}
    if dtype == torch.bfloat16 and config.parallel.zero > 0:
        # Otherwise gradients of the micro-batches, and of the ranks, are summed in 8 bits of mantissa.
        result |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return result


def _initialise(objective: Objective, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """deepspeed.initialize, without its noise and without its shared-memory all-reduce."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    # DeepSpeed calls functions that newer versions of torch have renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*")
    # stdout: DeepSpeed prints and asks compilers for their versions; warnings: of packages that are not needed.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops
        from deepspeed.utils import logger as noisy

        noisy.setLevel(getattr(logging, os.environ["DEEPSPEED_LOG_LEVEL"].upper(), logging.ERROR))
        # Compiled at start (a minute); a rank killed meanwhile leaves a lock on which every later process waits for
        # ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _import_without_compiler("deepspeed.runtime.zero.muon.original_muon")
        engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def _import_without_compiler(module: str) -> None:
    """Import a module of DeepSpeed that marks functions for `torch.compile`, without loading the compiler (seconds per
    rank).

    DeepSpeed imports its Muon optimizer to see that ours is a different one; we never run it.
    """
    plain = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda inner: inner)
    try:
        importlib.import_module(module)
    except ImportError:
        logger.debug("this version of DeepSpeed has no %s", module)
    finally:
        torch.compile = plain
