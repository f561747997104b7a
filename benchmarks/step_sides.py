"""What `step.py` compares: batches, the models, and one training step of each."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from straightforward import PaddedBatch, StraightforwardExLM  # noqa: E402

from exlm_dist.config.schema import ModelConfig  # noqa: E402
from exlm_dist.data.batch import PackedBatch  # noqa: E402
from exlm_dist.data.expansion import expand, wrap  # noqa: E402
from exlm_dist.data.masking import mask_batch, sample_keys  # noqa: E402
from exlm_dist.data.packing import pack  # noqa: E402
from exlm_dist.model.build import build_model  # noqa: E402
from exlm_dist.model.cost import Sizes, flops_per_sequence  # noqa: E402
from exlm_dist.model.objective import loss_sum  # noqa: E402
from exlm_dist.model.stream import Stream  # noqa: E402
from exlm_dist.tokenizers.tokenizer import NUM_SPECIAL  # noqa: E402

STATES = 4
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}


@dataclass(frozen=True)
class Shape:
    """Size of a model, and tokens of a micro-batch (before expansion); `length` overrides the command line."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    tokens: int
    length: int | None = None
    bucket: int = 1024


SHAPES = {
    "base": Shape(12, 768, 12, 50_304, 512 * 128),
    "large": Shape(24, 1024, 16, 50_304, 256 * 128),
    # So small that the host is the limit: molecules, as in the first real training (docs/lab-log.md).
    "molecules": Shape(4, 256, 8, 128, 256 * 44, 44),
    "toy": Shape(2, 64, 2, 64, 4 * 16, 16, 32),
}


def model_config(shape: Shape, objective: str, dropout: float) -> ModelConfig:
    """ExLM with anchors and dense transitions, or the plain masked language model, both pre-norm and tied."""
    body = {
        "layers": shape.layers,
        "width": shape.width,
        "heads": shape.heads,
        "ffn": 4 * shape.width,
        "dropout": dropout,
        "attention_dropout": dropout,
    }
    if objective == "mlm":
        return ModelConfig(objective="mlm", states=1, anchors=False, rotary="1d", transitions="uniform", **body)
    return ModelConfig(states=STATES, **body)


def make_batch(config: ModelConfig, shape: Shape, length: int, sequences: int, seed: int) -> PackedBatch:
    """Random tokens in equal blocks of `length` (BOS and EOS counted), by the package's own masking and packing."""
    random = np.random.default_rng(seed)
    lengths = np.full(sequences, length - 2)
    tokens = random.integers(NUM_SPECIAL, shape.vocabulary, lengths.sum())
    samples, epochs = np.arange(sequences), np.zeros(sequences, np.int64)
    masks = mask_batch(tokens, lengths, sample_keys(seed, epochs, samples), ratio=0.15, vocab_size=shape.vocabulary)
    expanded = expand(wrap(tokens, lengths, masks, anchors=config.anchors), config.states)
    identity = {"sample_ids": samples, "epochs": epochs, "step": 0, "index": 0}
    return pack(expanded, 0, sequences, states=config.states, bucket=shape.bucket, **identity)


def ideal_flops(config: ModelConfig, shape: Shape, length: int, batch: PackedBatch) -> float:
    """Operations of a step on `batch` in the ideal count of `exlm_dist/model/cost.py`."""
    masked = batch.num_targets / batch.num_sequences - (2 if config.anchors else 0)
    parts = flops_per_sequence(config, shape.vocabulary, Sizes.of(config, length, masked))
    return batch.num_sequences * sum(parts.values())


def needed_flops(config: ModelConfig, shape: Shape, length: int, batch: PackedBatch) -> float:
    """The ideal count minus what the last block skips: after its attention it continues with the states only."""
    rows = batch.num_tokens - batch.num_states
    return ideal_flops(config, shape, length, batch) - 6 * rows * config.width * (config.width + 2 * config.ffn)


class MasterAdamW:
    """Fused AdamW over an fp32 copy of bf16 parameters, as mixed-precision training keeps it."""

    def __init__(self, parameters: list[torch.nn.Parameter], *, capturable: bool = False) -> None:
        self.parameters = parameters
        self.master = [parameter.detach().float() for parameter in parameters]
        on_gpu = parameters[0].is_cuda
        self.inner = torch.optim.AdamW(self.master, **ADAMW, fused=True, capturable=capturable and on_gpu)

    @torch.no_grad()
    def step(self) -> None:
        """Update from the gradients of the parameters, and free them."""
        for copy, parameter in zip(self.master, self.parameters):
            copy.grad, parameter.grad = parameter.grad.float(), None
        self.inner.step()
        self.inner.zero_grad()
        torch._foreach_copy_(self.parameters, self.master)


class Ours:
    """The package's model on one device with its optimizer; `config` says whether ExLM or the plain model."""

    def __init__(self, config: ModelConfig, shape: Shape, device: torch.device, *, capturable: bool = False) -> None:
        self.device = device
        self.model = build_model(config, shape.vocabulary, seed=0).to(device, working_dtype(device)).train()
        self.optimizer = MasterAdamW(list(self.model.parameters()), capturable=capturable)
        self.steps = 0

    def step(self, batch: PackedBatch) -> torch.Tensor:
        """One training step from arrays on the host; returns the loss on the device."""
        self.steps += 1
        return self.step_on(Stream.from_batch(batch, self.device, dropout_seed=self.steps))

    def step_on(self, stream: Stream) -> torch.Tensor:
        """One training step on a batch that is already on the device."""
        total, _ = loss_sum(self.model(stream), "sequence")
        loss = total / stream.num_sequences
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class Straightforward:
    """The baseline: fp32 parameters under autocast, fused AdamW."""

    def __init__(self, config: ModelConfig, shape: Shape, device: torch.device) -> None:
        self.device = device
        self.model = StraightforwardExLM.of(config, shape.vocabulary, config.dropout).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **ADAMW, fused=True)

    def step(self, batch: PaddedBatch) -> torch.Tensor:
        """One training step on a batch that is already on the device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def working_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; fp32 on a CPU, where only the toy shape runs."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def check_equal(device: torch.device, **changes: object) -> float:
    """Relative difference of the two losses at toy size in fp32 without dropout, from the same weights; `changes` of
    the model's settings.
    """
    shape = SHAPES["toy"]
    config = ModelConfig.model_validate(model_config(shape, "exlm", 0.0).model_dump() | changes)
    batch = make_batch(config, shape, 40, 5, seed=0)
    ours = build_model(config, shape.vocabulary, seed=0)
    other = StraightforwardExLM.of(config, shape.vocabulary, 0.0)
    other.load_state_dict(ours.state_dict())
    with torch.no_grad():
        result = ours.to(device)(Stream.from_batch(batch, device))
        loss = float(loss_sum(result, "sequence")[0]) / batch.num_sequences
        expected = float(other.to(device)(PaddedBatch.from_packed(batch).to(device)))
    return abs(loss - expected) / abs(expected)
