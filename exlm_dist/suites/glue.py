"""GLUE (Wang et al. 2019, arXiv 1804.07461): nine tasks of one or two sentences, with GLUE's metrics.

The protocols are those of the papers that models of this size are compared with, as far as they are published:

- `coco`: COCO-LM (Meng et al. 2021; github.com/microsoft/COCO-LM, fairseq/README.md), the best rate of each task.
- `dinky`: DinkyTrain's finetune_glue.sh (github.com/princeton-nlp/DinkyTrain): weight decay 0.1, the last epoch. It
  takes rate, batch and epochs as arguments: those here are RoBERTa's rate and COCO-LM's batch and epochs.
- `roberta`: RoBERTa (Liu et al. 2019; fairseq, examples/roberta/README.glue.md), without starting from MNLI.
- `quick`: three epochs, the same for all tasks: to see that all works, not for figures that are to be compared.
"""

from __future__ import annotations

from dataclasses import replace

from exlm_dist.finetuning.finetune_settings import TrainingSettings
from exlm_dist.suites.glue_task import GlueTask
from exlm_dist.suites.suite import OFFICIAL, Baseline, Suite

COCO, DINKY, ROBERTA, QUICK = "coco", "dinky", "roberta", "quick"
#: What all published ones have in common: the vector of `<s>`, and no clipping of gradients.
_PUBLISHED = TrainingSettings(pooling="first", clip=0.0, patience=0)
_QUICK = TrainingSettings(epochs=3, batch=32, lr=2e-4, patience=0)
_SENTENCE = (("sentence",),)
_PAIR = (("sentence1", "sentence2"),)
_NUMBERED = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")


def _protocols(coco_lr: float, *, lr: float = 1e-5, epochs: int = 10, batch: int = 16) -> dict[str, TrainingSettings]:
    """Those of a task. coco_lr, epochs: of COCO-LM; lr: of RoBERTa; batch: of both."""
    as_roberta = replace(_PUBLISHED, lr=lr, batch=batch, weight_decay=0.1, warmup=0.06)
    return {
        COCO: replace(_PUBLISHED, lr=coco_lr, epochs=epochs, batch=batch, weight_decay=0.01, warmup=1 / 16),
        DINKY: replace(as_roberta, epochs=epochs, keep="last"),
        ROBERTA: replace(as_roberta, epochs=10),
        QUICK: _QUICK,
    }


_COLA = GlueTask(
    name="cola",
    folder="CoLA",
    kind="classification",
    metric="mcc",
    also=(("valid", "accuracy"),),
    inputs=_SENTENCE,
    labels=_NUMBERED,
    headerless=(("label", "2"), ("sentence", "4")),
    protocols=_protocols(2e-5),
)
_SST2 = GlueTask(
    name="sst2",
    folder="SST-2",
    kind="classification",
    metric="accuracy",
    inputs=_SENTENCE,
    labels=_NUMBERED,
    protocols=_protocols(2e-5, epochs=5, batch=32),
)
_MRPC = GlueTask(
    name="mrpc",
    folder="MRPC",
    kind="classification",
    metric="accuracy",
    also=(("valid", "f1"),),
    inputs=(("#1 String", "#2 String"), *_PAIR),
    label_names=("Quality", "label"),
    labels=_NUMBERED,
    protocols=_protocols(4e-5),
)
_STSB = GlueTask(
    name="stsb",
    folder="STS-B",
    kind="regression",
    metric="spearman",
    also=(("valid", "pearson"),),
    inputs=_PAIR,
    label_names=("score", "label"),
    limits=(0.0, 5.0),
    protocols=_protocols(4e-5, lr=2e-5),
)
_QQP = GlueTask(
    name="qqp",
    folder="QQP",
    kind="classification",
    metric="accuracy",
    also=(("valid", "f1"),),
    inputs=(("question1", "question2"),),
    label_names=("is_duplicate", "label"),
    labels=_NUMBERED,
    protocols=_protocols(3e-5, epochs=5, batch=32),
)
_MNLI = GlueTask(
    name="mnli",
    folder="MNLI",
    parts=(("train", "train"), ("valid", "dev_matched"), ("mismatched", "dev_mismatched")),
    kind="classification",
    metric="accuracy",
    also=(("mismatched", "accuracy"),),
    inputs=(*_PAIR, ("premise", "hypothesis")),
    label_names=("gold_label", "label"),
    labels=("entailment", "neutral", "contradiction"),
    protocols=_protocols(2e-5, epochs=2, batch=32),
)
_QNLI = GlueTask(
    name="qnli",
    folder="QNLI",
    kind="classification",
    metric="accuracy",
    inputs=(("question", "sentence"),),
    labels=_ENTAILMENT,
    protocols=_protocols(1e-5, epochs=5, batch=32),
)
_RTE = GlueTask(
    name="rte",
    folder="RTE",
    kind="classification",
    metric="accuracy",
    inputs=_PAIR,
    labels=_ENTAILMENT,
    protocols=_protocols(2e-5, lr=2e-5),
)
_WNLI = GlueTask(
    name="wnli",
    folder="WNLI",
    kind="classification",
    metric="accuracy",
    averaged=False,
    inputs=_PAIR,
    labels=_NUMBERED,
    protocols=_protocols(2e-5),
)

GLUE = Suite(
    name="glue",
    domain="text",
    tasks=(_COLA, _SST2, _MRPC, _STSB, _QQP, _MNLI, _QNLI, _RTE, _WNLI),
    part="valid",
    splits=(OFFICIAL,),
    default_splits=(OFFICIAL,),
    protocols=(COCO, DINKY, ROBERTA, QUICK),
    probe={"frozen": True, "pooling": "mean", "lr": 1e-3, "batch": 32, "epochs": 30, "dropout": 0.0, "keep": "best"},
    baselines=(Baseline("bag-of-words", ("linear",), seeded=False),),
)
