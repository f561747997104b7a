"""The DeepSpeed engines of a run, and their state as the checkpoint format sees it."""

from __future__ import annotations

from exlm_dist.config import RunConfig
from exlm_dist.parallel.process import Process
from exlm_dist.training.engine.base import Engine
from exlm_dist.training.engine.pipeline_engine import PipelineEngine
from exlm_dist.training.engine.zero_engine import ZeroEngine


def build_engine(config: RunConfig, process: Process, vocab_size: int, length: float, *, drawn: bool = True) -> Engine:
    """The engine for the layout of `config`; `length`: mean tokens of a sequence, by which layers are cut into
    stages; `drawn`: with initial weights, else it is to be filled from a checkpoint."""
    if process.grid.pipeline.size == 1:
        return ZeroEngine(config, process, vocab_size, drawn=drawn)
    return PipelineEngine(config, process, vocab_size, length, drawn=drawn)
