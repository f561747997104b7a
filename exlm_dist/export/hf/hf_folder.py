"""`exlm export hf`: the folder, written whole or not at all. The transformers library is not needed for it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from exlm_dist.checkpoint.hf_export import MODEL_TYPE, SETTINGS, hf_name
from exlm_dist.checkpoint.reader import TOKENIZER_FOLDER, find_checkpoint, load_weights, read_config
from exlm_dist.config.schema import ModelConfig
from exlm_dist.export.hf.model_card import model_card
from exlm_dist.export.hf.tokenizer_json import tokenizer_config, tokenizer_json
from exlm_dist.model.block import NORM_EPS
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.tokenizer import BOS, EOS, MASK, PAD
from exlm_dist.utils.errors import CheckpointError
from exlm_dist.utils.files import sync_path, write_atomic, write_json

#: Files of this folder that are copied into each export.
CODE_FILES = ("configuration_exlm.py", "graph_exlm.py", "modeling_exlm.py")
_AUTO_CLASSES = {
    "AutoModel": "ExLMModel",
    "AutoModelForMaskedLM": "ExLMForMaskedLM",
    "AutoModelForSequenceClassification": "ExLMForSequenceClassification",
    "AutoModelForTokenClassification": "ExLMForTokenClassification",
    "AutoModelForQuestionAnswering": "ExLMForQuestionAnswering",
}


def export_hf(checkpoint: Path, out: Path) -> str:
    """Write a checkpoint (or a run's newest) as a folder for the transformers library; a line that says so.

    An earlier export at `out` is replaced. CheckpointError if `out` is anything else, or the checkpoint is not whole;
    DataError if its tokenizer cannot be expressed as `tokenizer.json`.
    """
    out = Path(os.path.abspath(out))
    _check_target(out)
    folder = find_checkpoint(Path(checkpoint))
    config = read_config(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    weights = hf_weights(load_weights(folder, verified=True))
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    documents = {
        "config.json": hf_config(config.model, tokenizer.vocab_size),
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config(tokenizer, config.model.max_positions),
    }
    texts = {name: (Path(__file__).parent / name).read_text(encoding="utf-8") for name in CODE_FILES}
    texts["README.md"] = model_card(folder, config, tokenizer, num_parameters)
    _write(out, weights, documents, texts)
    return f"{out}: {num_parameters:,} parameters of {folder} for the transformers library (trust_remote_code=True)"


def hf_config(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Content of `config.json`."""
    auto = {name: f"modeling_exlm.{target}" for name, target in _AUTO_CLASSES.items()}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["ExLMForMaskedLM"],
        "auto_map": {"AutoConfig": "configuration_exlm.ExLMConfig", **auto},
        "dtype": "float32",
        "vocab_size": vocab_size,
        **{key: getattr(model, setting) for key, setting in SETTINGS.items()},
        "layer_norm_eps": NORM_EPS,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "mask_token_id": MASK,
    }


def hf_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under the names of `ExLMForMaskedLM`; a tied matrix is there once, as the embedding."""
    return {hf_name(name): value.contiguous() for name, value in weights.items()}


def _check_target(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())) or _is_export(out):
        return
    raise CheckpointError(f"{out} exists and is no earlier export. Choose another --out, or remove it yourself.")


def _is_export(out: Path) -> bool:
    try:
        content = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("model_type") == MODEL_TYPE


def _write(out: Path, weights: dict[str, Tensor], documents: dict[str, Any], texts: dict[str, str]) -> None:
    """Write all files beside `out`, then rename once."""
    from safetensors.torch import save_file

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch, "new")
        folder.mkdir()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
        sync_path(folder / "model.safetensors")
        for name, content in documents.items():
            write_json(folder / name, content)
        for name, text in texts.items():
            write_atomic(folder / name, text)
        _check_target(out)
        if out.exists():
            os.rename(out, Path(scratch, "old"))
        os.rename(folder, out)
    sync_path(out.parent)
