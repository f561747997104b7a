"""A small prepared folder and runs over it that look finished, made in a second, for tests of what reads them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import write_checkpoint

from exlm_dist.config import RunConfig, dump_config
from exlm_dist.data.manifest import MANIFEST, SCHEMA, sealed
from exlm_dist.data.shards import ShardDataset
from exlm_dist.prepare.shard_writer import ShardWriter
from exlm_dist.tokenizers.smiles_tokenizer import SmilesTokenizer, split_smiles
from exlm_dist.tracking import EventLog

MOLECULES = [
    "CC(=O)Oc1ccccc1C(=O)O",
    "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
    "CC(C)Cc1ccc(cc1)C(C)C(=O)O",
    "CC(=O)Nc1ccc(O)cc1",
    "c1ccccc1CCN",
    "OC(=O)c1ccccc1O",
    "CCOC(=O)c1ccc(N)cc1",
    "CN(C)CCOC(c1ccccc1)c1ccccc1",
    "C1CCNCC1",
    "NCCc1ccc(O)c(O)c1",
]


def make_data(folder: Path, *, extra_token: str = "[Na+]", repeats: int = 6) -> Path:
    """A prepared folder of a few known drugs, `repeats` times; another `extra_token` gives another tokenizer."""
    counts = Counter(token for smiles in MOLECULES for token in split_smiles(smiles))
    tokenizer = SmilesTokenizer.from_counts(counts + Counter([extra_token]), {"stereo": "keep", "salts": "keep"})
    tokenizer.save(folder / "tokenizer")
    splits = {}
    for split, times in (("train", repeats), ("valid", 3)):
        writer = ShardWriter(folder, split, vocab_size=tokenizer.vocab_size)
        writer.write(*tokenizer.encode_batch(MOLECULES * times))
        splits[split] = {"sequences": times * len(MOLECULES), "shards": [entry.as_dict() for entry in writer.close()]}
    manifest = {
        "schema": SCHEMA,
        "domain": "smiles",
        "vocab_size": tokenizer.vocab_size,
        "max_length": 64,
        "splits": splits,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "files": {}},
    }
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    return folder


def make_config(runs: Path, name: str, data: Path, objective: str = "exlm", **sections) -> RunConfig:
    """A tiny model of either objective, with transitions as the authors' code has them."""
    model = {
        "jump_prior": "none",
        "layers": 1,
        "width": 16,
        "heads": 2,
        "ffn": 32,
        "max_positions": 256,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "objective": objective,
    }
    model |= {"states": 4} if objective == "exlm" else {"states": 1, "anchors": False}
    return RunConfig.model_validate(
        {
            "name": name,
            "runs": str(runs),
            "budget": "unit-test",
            "data": {"path": str(data)},
            "model": model,
            "batch": {"sequences": 8, "micro": 8},
            "schedule": {"steps": 100},
            "tracking": {"mlflow": False},
            **sections,
        }
    )


def with_sources(config: RunConfig, sources: dict[str, Any], phases: Sequence[Any] = (), **data: Any) -> RunConfig:
    """The run with these sources in place of its `data.path`."""
    settings = {**config.model_dump(), "data": {"sources": sources, **data}, "phases": phases}
    return RunConfig.model_validate(settings)


def make_run(config: RunConfig, *, seconds_per_step: float = 0.5, level: float = 1.0) -> Path:
    """Run folder with config, curves of the usual shape, and one checkpoint (step 100) of the initial weights."""
    folder = Path(config.runs) / config.name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    log = EventLog(folder / "events.jsonl")
    log.status("RUNNING")
    for step in range(5, 101, 5):
        nll = level * (0.6 + 2.4 * math.exp(-step / 30))
        noise = 0.05 * math.sin(step * 1.7)
        log.metrics(
            step,
            {
                "train/loss": 1.2 * nll + noise,
                "train/nll": nll + noise,
                "train/accuracy": math.exp(-nll),
                "train/lr": 1e-3 * min(step / 10, (100 - step) / 90),
                "train/grad_norm": 1 + nll,
                "train/invalid_sequences": 0,
                "perf/tokens_per_second": 2000 / seconds_per_step,
                "perf/expanded_tokens_per_second": 3000 / seconds_per_step,
                "perf/step_seconds": seconds_per_step,
                "perf/wait_seconds": 0.02,
                "perf/padding_fraction": 0.05,
                "progress/seconds": step * seconds_per_step,
            },
        )
        if step % 20 == 0:
            log.metrics(step, {"valid/nll": nll, "valid/accuracy": math.exp(-nll), **_alignment(config, nll)})
    log.status("FINISHED")
    log.close()
    write_initial_checkpoint(config, folder)
    return folder


def _alignment(config: RunConfig, nll: float) -> dict[str, float]:
    if config.model.objective == "mlm":
        return {}
    names = ("prior_entropy", "posterior_entropy", "prior_own", "posterior_own", "states_used", "token_spread")
    return {f"valid/alignment_{name}": math.exp(-nll) + (name == "states_used") for name in names}


def write_initial_checkpoint(config: RunConfig, folder: Path, step: int = 100) -> Path:
    """Checkpoint of the freshly initialised model."""
    from exlm_dist.model.build import build_model

    (folder / "checkpoints").mkdir(exist_ok=True)
    vocab_size = ShardDataset.open(Path(config.data.path), "valid").vocab_size
    model = build_model(config.model, vocab_size, seed=config.seed)
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    return write_checkpoint(
        folder,
        step,
        model=weights,
        optimizer={},
        state={"step": step},
        config=dump_config(config),
        tokenizer=Path(config.data.path) / "tokenizer",
    )


def ids_of(smiles: str, data: Path) -> np.ndarray:
    """Token ids of one molecule."""
    return np.array(SmilesTokenizer.load(data / "tokenizer").encode(smiles))
