"""Figures that the paper on ExLM publishes, to stand beside those of other budgets.

Zheng et al., ICML 2025, arXiv 2501.13397. Of its MoleculeNet table the sets whose columns are certain in all accounts
of it that were at hand; ROC-AUC on scaffold splits, here as fractions. Of GLUE the development sets.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A row of a table. budget: of its pretraining, in words; tokens: about how many it saw, before expansion."""

    label: str
    objective: str
    budget: str
    tokens: float
    scores: dict[str, float]


@dataclass(frozen=True)
class PublishedArm:
    """A row of the paper's ablation. settings: how it differs from the full model."""

    label: str
    settings: dict[str, str]
    scores: dict[str, float]


#: Of the paper's ablation (k = 4, development sets): a budget of its own, far smaller than that of its main table.
ABLATION_TOKENS = 23_000 * 4096 * 128.0
ABLATION_BUDGET = "about 23,000 updates of 4,096 x 128 tokens (the recipe of the authors' public code)"
_ABLATED = ("mnli", "qnli", "qqp", "rte")
ABLATION = (
    PublishedArm("plain", {"objective": "mlm"}, dict(zip(_ABLATED, (0.836, 0.900, 0.903, 0.547)))),
    PublishedArm("w/o transitions", {"transitions": "uniform"}, dict(zip(_ABLATED, (0.838, 0.909, 0.911, 0.556)))),
    PublishedArm("w/o 2D RoPE", {"rotary": "1d"}, dict(zip(_ABLATED, (0.846, 0.911, 0.913, 0.567)))),
    PublishedArm("sparse DAG", {"transitions": "sparse"}, dict(zip(_ABLATED, (0.844, 0.912, 0.913, 0.569)))),
    PublishedArm("full ExLM", {}, dict(zip(_ABLATED, (0.851, 0.914, 0.913, 0.576)))),
)
_SMILES = "about 120,000 updates of 32,000 tokens (as the same authors' public code for molecules has them)"
_TEXT = "about 125,000 updates of 2,048 x 512 tokens (the base setting of COCO-LM)"
_GLUE = ("mnli", "qqp", "qnli", "sst2", "cola", "rte", "mrpc", "stsb")
#: By suite.
PUBLISHED: dict[str, tuple[Published, ...]] = {
    "moleculenet": (
        Published(
            "paper: plain", "mlm", _SMILES, 3.8e9, {"bace": 0.778, "bbbp": 0.686, "tox21": 0.751, "clintox": 0.898}
        ),
        Published(
            "paper: ExLM", "exlm", _SMILES, 3.8e9, {"bace": 0.796, "bbbp": 0.728, "tox21": 0.782, "clintox": 0.916}
        ),
    ),
    "glue": (
        Published(
            "paper: RoBERTa",
            "mlm",
            _TEXT,
            1.31e11,
            dict(zip(_GLUE, (0.859, 0.916, 0.923, 0.937, 0.643, 0.755, 0.887, 0.895))),
        ),
        Published(
            "paper: ExLM",
            "exlm",
            _TEXT,
            1.31e11,
            dict(zip(_GLUE, (0.869, 0.920, 0.931, 0.939, 0.646, 0.788, 0.896, 0.905))),
        ),
    ),
}
