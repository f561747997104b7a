"""MoleculeNet (Wu et al. 2018, doi 10.1039/C7SC02664A): the seven sets of classes that pretraining on molecules is
compared on, HIV, and three sets of values.

Columns are those of the files that MoleculeNet itself offers. The protocol `unimol` has the hyper-parameters that
Uni-Mol publishes for each set (github.com/deepmodeling/Uni-Mol, unimol/README.md).
"""

from __future__ import annotations

from exlm_dist.finetuning.finetune_settings import TrainingSettings
from exlm_dist.suites.molecule_task import MoleculeTask
from exlm_dist.suites.suite import Baseline, Suite

UNIMOL, QUICK = "unimol", "quick"
#: A network on graphs, as `--checkpoint` has it and as its program is called.
CHEMPROP = "chemprop"
#: A short training, the same for all sets: to see that all works, not for figures that are to be compared.
_QUICK = TrainingSettings(epochs=10, batch=32, lr=5e-4, patience=0)
_INPUTS = ("smiles", "mol")
_OTHERS = ("mol_id", "num", "name")


def _task(
    name: str,
    *targets: str,
    files: tuple[str, ...] = (),
    values: bool = False,
    lr: float,
    batch: int,
    epochs: int,
    dropout: float,
    warmup: float,
) -> MoleculeTask:
    kind, metric = ("regression", "rmse") if values else ("classification", "roc_auc")
    published = TrainingSettings(
        epochs=epochs, batch=batch, lr=lr, dropout=dropout, warmup=warmup, weight_decay=0.0, clip=1.0, patience=20
    )
    protocols = {UNIMOL: published, QUICK: _QUICK}
    return MoleculeTask(
        name=name,
        kind=kind,
        metric=metric,
        protocols=protocols,
        files=(name, *files),
        inputs=_INPUTS,
        targets=targets,
        others=_OTHERS,
    )


MOLECULENET = Suite(
    name="moleculenet",
    domain="smiles",
    tasks=(
        _task("bbbp", "p_np", lr=4e-4, batch=128, epochs=40, dropout=0.0, warmup=0.06),
        _task("bace", "Class", lr=1e-4, batch=64, epochs=60, dropout=0.1, warmup=0.06),
        _task("clintox", "FDA_APPROVED", "CT_TOX", lr=5e-5, batch=256, epochs=100, dropout=0.5, warmup=0.1),
        _task("tox21", lr=1e-4, batch=128, epochs=80, dropout=0.1, warmup=0.06),
        _task("toxcast", files=("toxcast_data",), lr=1e-4, batch=64, epochs=80, dropout=0.1, warmup=0.06),
        _task("sider", lr=5e-4, batch=32, epochs=80, dropout=0.0, warmup=0.1),
        _task("muv", lr=2e-5, batch=128, epochs=40, dropout=0.0, warmup=0.0),
        _task("hiv", "HIV_active", lr=5e-5, batch=256, epochs=5, dropout=0.2, warmup=0.1),
        _task(
            "esol",
            "measured log solubility in mols per litre",
            files=("delaney-processed", "delaney", "esol_delaney-processed"),
            values=True,
            lr=5e-4,
            batch=256,
            epochs=100,
            dropout=0.2,
            warmup=0.06,
        ),
        _task(
            "freesolv",
            "expt",
            files=("sampl", "freesolv_sampl"),
            values=True,
            lr=8e-5,
            batch=64,
            epochs=60,
            dropout=0.2,
            warmup=0.1,
        ),
        _task(
            "lipophilicity",
            "exp",
            files=("lipo",),
            values=True,
            lr=1e-4,
            batch=32,
            epochs=80,
            dropout=0.1,
            warmup=0.06,
        ),
    ),
    part="test",
    splits=("scaffold", "scaffold-chiral", "random"),
    default_splits=("scaffold", "scaffold-chiral"),
    protocols=(UNIMOL, QUICK),
    probe={"frozen": True, "lr": 1e-3, "batch": 32, "epochs": 100, "dropout": 0.0, "patience": 20},
    embed_once=True,
    baselines=(Baseline("fingerprints", ("forest", "boosting")), Baseline(CHEMPROP, (CHEMPROP,))),
)
