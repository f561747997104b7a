"""What is written by `exlm export hf`, as far as reading it back needs: names of settings and tensors, the tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exlm_dist.checkpoint.tensors import WholeTensors, read_header
from exlm_dist.utils.errors import CheckpointError

if TYPE_CHECKING:
    from exlm_dist.config.schema import ModelConfig

MODEL_TYPE = "exlm"
CONFIG_JSON = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER_JSON = "tokenizer.json"
#: Setting of `model` by its key in `config.json`.
SETTINGS = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn",
    "objective": "objective",
    "states": "states",
    "transitions": "transitions",
    "jump_prior": "jump_prior",
    "jump_width": "jump_width",
    "jump_floor": "jump_floor",
    "transition_positions": "transition_positions",
    "anchors": "anchors",
    "rotary": "rotary",
    "norm": "norm",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "max_position_embeddings": "max_positions",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_head",
}
_RENAMED = {"output.weight": "output.decoder.weight", "output.bias": "output.decoder.bias"}


def hf_name(name: str) -> str:
    """Name of a parameter in `ExLMForMaskedLM`."""
    return _RENAMED.get(name, name if name.startswith("output.") else f"exlm.{name}")


def is_export(folder: Path) -> bool:
    """Whether this is an exported folder, by its `config.json`."""
    try:
        return _read_json(Path(folder) / CONFIG_JSON).get("model_type") == MODEL_TYPE
    except CheckpointError:
        return False


def read_model(folder: Path) -> ModelConfig:
    """Section `model` of the run. What is not in `config.json` has the default of the exported code, as transformers
    leaves that out."""
    from exlm_dist.config.schema import ModelConfig  # not above: what writes checkpoints starts faster without

    content = _read_json(Path(folder) / CONFIG_JSON)
    try:
        given = {ours: content[key] for key, ours in SETTINGS.items() if key in content}
        return ModelConfig.model_validate({"jump_prior": "none", **given})
    except ValueError as error:
        raise CheckpointError(f"{Path(folder) / CONFIG_JSON}: {error}") from error


def read_tokens(folder: Path) -> list[str]:
    """The token of every id."""
    path = Path(folder) / TOKENIZER_JSON
    try:
        vocabulary = _read_json(path)["model"]["vocab"]
        if isinstance(vocabulary, dict):
            by_id = {number: token for token, number in vocabulary.items()}
            return [by_id[number] for number in range(len(by_id))]
        return [token for token, _ in vocabulary]
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has no list of tokens that can be read ({error!r}).") from error


def open_weights(folder: Path) -> WholeTensors:
    """The parameters by canonical name; those of another head than `ExLMForMaskedLM`'s are left out. CheckpointError
    where the file is missing, is damaged or has other types than fp32."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}. Export it again, or save it in a single file.")
    ours = {hf: name for name, hf in _RENAMED.items()}
    names = {}
    for name in read_header(path):
        canonical = ours.get(name, name.removeprefix("exlm."))
        if name in ours or name.startswith(("exlm.", "output.")):
            names[name] = canonical
    return WholeTensors(path, names)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} cannot be read (it is no JSON object).")
    return content
