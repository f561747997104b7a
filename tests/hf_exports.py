"""Checkpoints to export, and what our model says of sequences: the definition that an export is compared with."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from checkpoints import write_checkpoint
from made_run import make_config

from exlm_dist.config import dump_config
from exlm_dist.config.schema import ModelConfig
from exlm_dist.model.build import build_model
from exlm_dist.model.objective import prior_paths
from exlm_dist.model.stream import Stream
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.tokenizer import PAD

VARIANTS = {
    "exlm": {},
    "untied post": {"tie_head": False, "norm": "post", "layers": 2, "jump_prior": "group"},
    "sparse": {"transitions": "sparse", "states": 3, "jump_prior": "laplace"},
    "uniform 1d": {"transitions": "uniform", "rotary": "1d"},
    "no anchors": {
        "anchors": False,
        "states": 2,
        "transition_positions": False,
        "jump_prior": "gaussian",
        "jump_width": 0.7,
    },
    "mlm": {"objective": "mlm", "states": 1, "anchors": False},
}
LENGTHS = [9, 4, 14, 1]


def make_checkpoint(folder: Path, data: Path, variant: str = "exlm", **written) -> Path:
    """Checkpoint of a model whose weights are far enough from their initial values to tell tokens and states apart."""
    config = make_config(folder, "run", data)
    model = ModelConfig.model_validate(config.model.model_dump() | VARIANTS[variant])
    config = config.model_copy(update={"model": model})
    (folder / "run" / "checkpoints").mkdir(parents=True)
    net = build_model(model, load_tokenizer(data).vocab_size, seed=3)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: (value.detach() + 0.3 * torch.randn(value.shape, generator=generator)).numpy()
        for name, value in net.named_parameters()
    }
    state = {"step": 7, "data_fingerprint": "f00d", "layout": {"world": 1}}
    about = {"state": state, "config": dump_config(config), "tokenizer": data / "tokenizer", **written}
    return write_checkpoint(folder / "run", 7, model=weights, optimizer={}, **about)


def padded_inputs(batch, left: bool = False):
    """(input_ids, attention_mask, is_masked) [B, L]: the sequences of a batch before their expansion."""
    rows, marks = [], []
    masked = dict(zip(batch.state_index[:: batch.states].tolist(), batch.is_masked.tolist()))
    for start, stop in zip(batch.cu_tokens[:-1].tolist(), batch.cu_tokens[1:].tolist()):
        kept = [i for i in range(start, stop) if batch.clone[i] < 2]
        rows.append(batch.input_ids[kept].tolist())
        marks.append([masked.get(i, False) for i in kept])
    longest = max(map(len, rows))

    def pad(row, value):
        fill = [value] * (longest - len(row))
        return fill + list(row) if left else list(row) + fill

    ids = torch.tensor([pad(row, PAD) for row in rows])
    attention = torch.tensor([pad([1] * len(row), 0) for row in rows])
    return ids, attention, torch.tensor([pad(row, False) for row in marks])


def distribution(model, stream: Stream) -> torch.Tensor:
    """log sum_u q_i(u) p_u(w), [B, N, V], with our prior marginals."""
    result = model(stream)
    hidden = hidden_states(model, stream)[stream.state_index]
    head = model.output
    log_p = F.linear(head.norm(F.gelu(head.dense(hidden))), head.weight, head.bias).log_softmax(-1)
    padded = stream.padded(log_p, stream.cu_states, stream.max_states, 0.0)
    return torch.logsumexp(prior_paths(result)[0].log()[..., None] + padded[:, None], 2)


def hidden_states(model, stream: Stream) -> torch.Tensor:
    """Features of all expanded tokens, [T, D]."""
    stream = stream.replace(select=False)
    for layer in [model.embedding, *model.blocks, model.norm]:
        stream = layer(stream)
    return stream.hidden


def plain_stream(row: torch.Tensor) -> Stream:
    """A sequence [L] without targets."""
    none = torch.zeros(0, dtype=torch.int64)
    bounds = torch.tensor([0, len(row)])
    return Stream(
        row, torch.arange(len(row)), torch.zeros_like(row), bounds, none, bounds * 0, none, bounds * 0,
        torch.tensor([0]), len(row), 0, 0, 1,
    )  # fmt: skip
