"""`README.md` of an exported model: what it is, how it was trained, how good it is, how to use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exlm_dist.checkpoint.reader import read_state, run_folder_of, step_of
from exlm_dist.checkpoint.weights_only import FAIRSEQ, describe_origin
from exlm_dist.config import RunConfig
from exlm_dist.config.phases import masking_of
from exlm_dist.config.ratios import describe_masking
from exlm_dist.tokenizers import Tokenizer
from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer
from exlm_dist.tracking import EVENTS, read_events

_USE = {
    "smiles": "CC(=O)Oc1ccccc1C(=O)<mask>",
    "text": "The <mask> of the river is deep.",
}


def model_card(checkpoint: Path, config: RunConfig, tokenizer: Tokenizer, num_parameters: int) -> str:
    """Markdown with the metadata block of the Hugging Face hub; nothing in it depends on the layout of the run."""
    model, state = config.model, read_state(checkpoint)
    kind = "plain masked language model" if model.objective == "mlm" else f"ExLM, k = {model.states} states per mask"
    facts = {
        "Run": f"{config.name}, step {step_of(checkpoint)}",
        "Model": f"{kind}; {num_parameters:,} parameters",
        "Size": f"{model.layers} layers, width {model.width}, {model.heads} heads, inner width {model.ffn}",
        "Budget": config.budget or "not labelled",
        "Domain": f"{tokenizer.domain}, vocabulary of {tokenizer.vocab_size}",
        "Masking": describe_masking(masking_of(config)),
        "Batch": f"{config.batch.sequences} sequences per step, {config.schedule.steps} steps planned",
        "Learning rate": f"{config.optimizer.lr:g} at most",
        "Data fingerprint": f"`{state.get('data_fingerprint', 'unknown')}`",
        "Tokenizer fingerprint": f"`{tokenizer.fingerprint}`",
        "Seed": config.seed,
    }
    if origin := describe_origin(state):
        facts["Made by"] = origin
    if init := state.get("init"):
        facts["First weights"] = f"of another checkpoint, SHA-256 `{init['sha256']}`"
    if state.get("origin", {}).get("kind") == FAIRSEQ:  # how it was trained is not known
        for unknown in ("Masking", "Batch", "Learning rate", "Seed"):
            del facts[unknown]
    if isinstance(tokenizer, SmilesTokenizer):
        facts["Policy for SMILES"] = f"`{json.dumps(tokenizer.policy, sort_keys=True)}`"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    parts = [_HEAD, f"# {config.name}\n", f"| | |\n| --- | --- |\n{rows}\n"]
    if isinstance(tokenizer, SmilesTokenizer):
        parts.append(_CANONICAL)
    parts += ["## Held-out results\n", _results(checkpoint), "## Use\n", _usage(tokenizer.domain)]
    return "\n".join(parts)


def _results(checkpoint: Path) -> str:
    rows = [
        f"| {split} | {masked} | {values['nll']:.4f} | {values['accuracy']:.2%} |"
        for split, masked, values in _evaluations(checkpoint)
    ]
    if not rows and run_folder_of(checkpoint) is None:
        return "None: this checkpoint belongs to no run, in whose log its evaluations would be.\n"
    if not rows:
        return "This checkpoint was not evaluated before it was exported (`exlm evaluate`).\n"
    unique = dict.fromkeys(rows)  # an evaluation while training is logged as metrics and with its checkpoint
    table = ["| split | masked | nll per masked token (nats) | accuracy |", "| --- | --- | --- | --- |", *unique]
    return "\n".join(table) + "\n"


def _evaluations(checkpoint: Path) -> list[tuple[str, str, dict[str, float]]]:
    """(split, masked, values by name) of each evaluation of the checkpoint that its run's event log has."""
    run_folder, step, found = run_folder_of(checkpoint), step_of(checkpoint), []
    path = None if run_folder is None else run_folder / EVENTS
    for event in read_events(path) if path is not None and path.is_file() else ():
        if event["kind"] not in ("metrics", "child_run") or event["step"] != step:
            continue
        tags: dict[str, Any] = event.get("tags", {})
        split = tags.get("split", "valid")
        values = {name: event["values"].get(f"{split}/{name}") for name in ("nll", "accuracy")}
        if None not in values.values():
            by_command = {"mask_ratio", "sequences"} <= tags.keys()  # the run's own evaluations do not say
            about = (
                f"{float(tags['mask_ratio']):.0%} of {tags['sequences']} sequences" if by_command else "while training"
            )
            found.append((split, about, values))
    return found


def _usage(domain: str) -> str:
    return f"""```python
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
encoder = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True)
fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
fill({_USE[domain]!r})
```

Needs transformers 5 or later. Without masks the model is an ordinary encoder. `ExLMForMaskedLM` expands each `<mask>`
into its states; the logits there are log-probabilities, summed over all paths through the states. Its `loss` is the
cross-entropy at each labelled position, for fine-tuning; it is not the likelihood that the pretraining maximised.
"""


_HEAD = """---
library_name: transformers
pipeline_tag: fill-mask
tags: [exlm, fill-mask]
---
"""
_CANONICAL = """The tokenizer splits SMILES as they are given. Make molecules canonical by the policy above
first: the model has seen no others.
"""
