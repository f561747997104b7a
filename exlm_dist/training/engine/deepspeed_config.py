"""The settings of DeepSpeed and of the optimizer. The DeepSpeed dictionary is generated here and nowhere else."""

from __future__ import annotations

from typing import Any

import torch

from exlm_dist.config import RunConfig
from exlm_dist.parallel.process import Process
from exlm_dist.utils.errors import ConfigError

#: Elements per communication bucket: large enough for full bandwidth, small enough for a laptop.
BUCKET = 50_000_000


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


def adamw_options(config: RunConfig, device: torch.device) -> dict[str, Any]:
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


def deepspeed_config(config: RunConfig, process: Process, dtype: torch.dtype, numel: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`; `numel`: elements of this rank's parameters."""
    bucket = min(BUCKET, -(-numel // 1024) * 1024)
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
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice for each micro-batch
    }
    if process.grid.pipeline.size > 1:
        # By default activations are split over the tensor ranks and gathered again on the next stage, on the assumption
        # that they are equal there: silently wrong with sequence parallelism.
        result["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if half:
        result[half] = {"enabled": True}
    if half == "bf16":
        # ZeRO 1 adds each gradient to its fp32 sum as soon as it is there and frees it. By default it keeps all of them
        # over the backward pass, and fills them with zeros before the next.
        result[half]["immediate_grad_update"] = True
    if dtype == torch.bfloat16 and config.parallel.zero > 0:
        # Otherwise gradients of the micro-batches, and of the ranks, are summed in 8 bits of mantissa.
        result |= {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return result
