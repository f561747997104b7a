"""`exlm export hf`: the folder, written whole or not at all. The transformers library is not needed for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from exlm_dist.checkpoint.hf_export import MODEL_TYPE, SETTINGS, hf_name, is_export
from exlm_dist.checkpoint.rank_files import write_file
from exlm_dist.checkpoint.reader import TOKENIZER_FOLDER, find_checkpoint, load_weights, read_config
from exlm_dist.checkpoint.tensors import write_header
from exlm_dist.config.schema import ModelConfig
from exlm_dist.export.hf.model_card import model_card
from exlm_dist.export.hf.tokenizer_json import tokenizer_config, tokenizer_json
from exlm_dist.model.block import NORM_EPS
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.tokenizers.tokenizer import BOS, EOS, MASK, PAD
from exlm_dist.utils.files import write_atomic, write_json
from exlm_dist.utils.outputs import check_space, user_path
from exlm_dist.utils.staging import FolderKind, check_output, staged_folder

#: Files of this folder that are copied into each export.
CODE_FILES = ("configuration_exlm.py", "graph_exlm.py", "modeling_exlm.py")
_AUTO_CLASSES = {
    "AutoModel": "ExLMModel",
    "AutoModelForMaskedLM": "ExLMForMaskedLM",
    "AutoModelForSequenceClassification": "ExLMForSequenceClassification",
    "AutoModelForTokenClassification": "ExLMForTokenClassification",
    "AutoModelForQuestionAnswering": "ExLMForQuestionAnswering",
}


def export_hf(checkpoint: Path, out: Path, *, overwrite: bool = False) -> str:
    """Write a checkpoint (or a run's newest) as a folder for the transformers library; a line that says so.

    OutputError if `out` exists, unless it is such a folder and `overwrite`, or cannot be written; CheckpointError if
    the checkpoint is not whole; DataError if its tokenizer cannot be expressed as `tokenizer.json`.
    """
    out = user_path(out)
    check_output(out, TRANSFORMERS_MODEL, overwrite)
    folder = find_checkpoint(user_path(checkpoint))
    config = read_config(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    weights = hf_weights(load_weights(folder, verified=True))
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    check_space(out, 4 * num_parameters, "the export")
    documents = {
        "config.json": hf_config(config.model, tokenizer.vocab_size),
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config(tokenizer, config.model.max_positions),
    }
    texts = {name: (Path(__file__).parent / name).read_text(encoding="utf-8") for name in CODE_FILES}
    texts["README.md"] = model_card(folder, config, tokenizer, num_parameters)
    with staged_folder(out, TRANSFORMERS_MODEL, overwrite=overwrite) as staged:
        _write_weights(staged / "model.safetensors", weights)
        for name, content in documents.items():
            write_json(staged / name, content)
        for name, text in texts.items():
            write_atomic(staged / name, text)
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


def _write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    header = write_header({name: tuple(tensor.shape) for name, tensor in weights.items()}, {"format": "pt"})
    elements = (memoryview(tensor.numpy().reshape(-1).view("uint8")) for tensor in weights.values())
    write_file(path, [header, *elements])


#: What may be replaced: an earlier export, or what `save_pretrained` made of one.
TRANSFORMERS_MODEL = FolderKind("a folder with an ExLM model for transformers", is_export, "config.json")
