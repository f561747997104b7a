"""SQuAD 2.0 (Rajpurkar et al. 2018, arXiv 1806.03822), in which half of the questions of the dev part have no answer,
and SQuAD 1.1 (Rajpurkar et al. 2016, arXiv 1606.05250), in which all have one.

`coco` is the training of COCO-LM (Meng et al. 2021; github.com/microsoft/COCO-LM), which tries rates from 2e-5 to 5e-5;
`quick` one epoch, to see that all works.
"""

from __future__ import annotations

from exlm_dist.finetuning.finetune_settings import TrainingSettings
from exlm_dist.suites.squad_task import SquadTask
from exlm_dist.suites.suite import OFFICIAL, Figure, Suite

COCO, QUICK = "coco", "quick"
_PROTOCOLS = {
    COCO: TrainingSettings(
        epochs=3, batch=32, lr=2e-5, weight_decay=0.01, warmup=0.1, clip=0.0, dropout=0.0, patience=0
    ),
    QUICK: TrainingSettings(epochs=1, batch=32, lr=2e-4, dropout=0.0, patience=0),
}


def _task(name: str, version: str, *also: Figure) -> SquadTask:
    return SquadTask(
        name=name, kind="answers", metric="f1", also=also, averaged=False, protocols=_PROTOCOLS, version=version
    )


SQUAD = Suite(
    name="squad",
    domain="text",
    tasks=(
        _task("squad2", "v2.0", ("valid", "em"), ("valid", "best_f1"), ("valid", "best_em")),
        _task("squad1", "v1.1", ("valid", "em")),
    ),
    part="valid",
    splits=(OFFICIAL,),
    default_splits=(OFFICIAL,),
    protocols=(COCO, QUICK),
    probe={"frozen": True, "lr": 1e-3, "epochs": 5},
)
