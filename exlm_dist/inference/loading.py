"""A checkpoint with everything that it takes to use it, on one device: what evaluation, embedding, filling, fine-tuning
and inspection all begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from exlm_dist.checkpoint.reader import CONFIG_FILE, TOKENIZER_FOLDER, find_checkpoint, load_weights, read_config
from exlm_dist.config import RunConfig
from exlm_dist.model.build import LanguageModel, build_model
from exlm_dist.tokenizers import Tokenizer, load_tokenizer
from exlm_dist.utils.errors import CheckpointError, ConfigError
from exlm_dist.utils.outputs import user_path


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A verified checkpoint in use. The model is in evaluation mode, in fp32 unless asked otherwise."""

    folder: Path
    config: RunConfig
    tokenizer: Tokenizer
    model: LanguageModel
    device: torch.device

    @property
    def max_tokens(self) -> int:
        """Most tokens of a text, BOS and EOS not counted."""
        return self.config.model.max_positions - 2


def load_checkpoint(path: Path | str, *, device: str = "auto", dtype: torch.dtype = torch.float32) -> LoadedCheckpoint:
    """Load a checkpoint folder, or the newest whole checkpoint of a run folder.

    device: 'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1'. CheckpointError if there is no whole checkpoint;
    ConfigError for a device that is not there.
    """
    chosen = choose_device(device)
    folder = find_checkpoint(user_path(path))
    config = read_config(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    model = load_model(folder, config, tokenizer).to(device=chosen, dtype=dtype)
    return LoadedCheckpoint(folder, config, tokenizer, model, chosen)


def load_model(folder: Path, config: RunConfig, tokenizer: Tokenizer) -> LanguageModel:
    """Model of a verified checkpoint with its weights, on the CPU, in evaluation mode.

    CheckpointError if the names or shapes of its parameters are not those of the model.
    """
    model = build_model(config.model, tokenizer.vocab_size, seed=None, kernel_backend=config.kernels.backend)
    weights = load_weights(folder, verified=True)
    # With a tied head the output layer uses the embedding: the checkpoint has the matrix once.
    wanted = dict(model.named_parameters())
    if set(wanted) != set(weights) or any(wanted[name].shape != weights[name].shape for name in wanted):
        differing = sorted(set(wanted) ^ set(weights)) or [
            name for name in wanted if wanted[name].shape != weights[name].shape
        ]
        raise CheckpointError(
            f"{folder}: its parameters are not those of the model in its {CONFIG_FILE} (first: {differing[0]}). "
            "Was it written by another version?"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(weights[name])
    return model.eval()


def choose_device(name: str) -> torch.device:
    """The device of that name; ConfigError if this machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here: {reason}. Give `auto`, `cpu` or `cuda`.") from None
    return device


def visible_devices(name: str) -> list[str]:
    """All devices that `name` stands for: of 'auto' and 'cuda' every GPU there is; the CPU where there is none.
    ConfigError if this machine has none such."""
    device = choose_device(name)
    if str(device) == "cuda":
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [str(device)]
