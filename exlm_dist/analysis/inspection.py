"""What a checkpoint does with single held-out sequences: transitions, posterior alignment, best path, likely tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from exlm_dist.checkpoint.reader import TOKENIZER_FOLDER, read_config, step_of
from exlm_dist.config import RunConfig
from exlm_dist.data.batch import PackedBatch
from exlm_dist.data.loader import eval_batches
from exlm_dist.data.opening import open_dataset
from exlm_dist.data.recipe import Recipe
from exlm_dist.evaluation.masked_lm import check_tokenizer
from exlm_dist.inference.loading import load_model
from exlm_dist.kernels.dag import dag_best_path, dag_posteriors
from exlm_dist.model.build import LanguageModel
from exlm_dist.model.stream import Stream
from exlm_dist.tokenizers import Tokenizer, load_tokenizer
from exlm_dist.tokenizers.tokenizer import MASK

#: Held-out sequences from which those to inspect are chosen.
POOL = 64


@dataclass(frozen=True)
class Inspection:
    """One sequence with N targets and L = k N states. Probabilities, not logarithms."""

    sample: int
    text: str  # what the model reads, with its masks
    targets: list[str]  # [N] what it is to predict
    positions: np.ndarray  # [N] index of each target in the unexpanded sequence
    states: int  # k
    transitions: np.ndarray  # [L, L] from the state of the row to that of the column
    posterior: np.ndarray  # [N, L] probability that a state emits a target, given all targets
    path: np.ndarray  # [L] target that each state emits on the most probable path, -1 off the path
    tokens: list[str]  # [L] most probable token of each state
    token_probability: np.ndarray  # [L] its probability

    @property
    def visits(self) -> np.ndarray:
        """Probability that a path visits each state, given the targets, [L]."""
        return self.posterior.sum(0)


def inspect_checkpoint(
    folder: Path, *, count: int = 3, data: Path | None = None
) -> tuple[RunConfig, int, list[Inspection]]:
    """Config and step of a verified checkpoint, and `count` held-out sequences of a size that can be drawn.

    An empty list for a plain masked language model, which has no graph. DataError if the data is missing or was
    prepared with another tokenizer.
    """
    config = read_config(folder)
    if config.model.objective == "mlm":
        return config, step_of(folder), []
    tokenizer = load_tokenizer(Path(folder) / TOKENIZER_FOLDER)
    data = Path(data if data is not None else config.data.path)
    dataset = open_dataset(data, "valid")
    check_tokenizer(tokenizer, folder, dataset, data)
    model = load_model(folder, config, tokenizer)
    recipe = replace(Recipe.for_evaluation(config, tokenizer.vocab_size), micro=POOL, bucket=1)
    (batch,) = eval_batches(dataset, recipe, sequences=POOL, rank=0, world=1)
    chosen = choose(np.diff(batch.cu_targets), batch.sample_ids, count)
    return config, step_of(folder), _inspect(model, batch, chosen, tokenizer)


def choose(num_targets: np.ndarray, samples: np.ndarray, count: int) -> list[int]:
    """Rows of the `count` sequences whose number of targets is nearest to 6; among equals the smallest sample ids."""
    return np.lexsort((samples, np.abs(num_targets - 6)))[:count].tolist()


@torch.no_grad()
def _inspect(model: LanguageModel, batch: PackedBatch, rows: Sequence[int], tokenizer: Tokenizer) -> list[Inspection]:
    features: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        features.append(output)

    hook = model.output.norm.register_forward_hook(keep)
    stream = model(Stream.from_batch(batch))
    hook.remove()
    sizes = (stream.num_targets, stream.num_states)
    posterior = dag_posteriors(stream.match, stream.transitions, *sizes, ends=stream.ends)
    path, _ = dag_best_path(stream.match, stream.transitions, *sizes, ends=stream.ends)
    probabilities, likeliest = F.linear(features[0], model.output.weight, model.output.bias).float().softmax(-1).max(-1)
    names = tokenizer.tokens()
    found = []
    for row in rows:
        targets, states = slice(*batch.cu_targets[row : row + 2]), slice(*batch.cu_states[row : row + 2])
        n, length = targets.stop - targets.start, states.stop - states.start
        found.append(
            Inspection(
                sample=int(batch.sample_ids[row]),
                text=_text(batch, row, names),
                targets=[names[token] for token in batch.target_ids[targets]],
                positions=batch.position[batch.state_index[states]][:: batch.states],
                states=batch.states,
                transitions=stream.transitions[row, :length, :length].exp().numpy(),
                posterior=posterior[row, :n, :length].numpy(),
                path=path[row, :length].numpy(),
                tokens=[names[token] for token in likeliest[states].tolist()],
                token_probability=probabilities[states].numpy(),
            )
        )
    return found


def _text(batch: PackedBatch, row: int, names: list[str]) -> str:
    """The unexpanded sequence, with a box for each mask."""
    tokens = slice(*batch.cu_tokens[row : row + 2])
    ids, clones = batch.input_ids[tokens], batch.clone[tokens]
    text = "".join("\u25a1" if token == MASK else names[token] for token in ids[clones <= 1][1:-1])
    return text.replace("\u2581", " ")
