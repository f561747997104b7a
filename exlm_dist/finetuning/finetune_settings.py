"""Settings of a fine-tuning; what each is, its default and its range. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from exlm_dist.utils.errors import ConfigError

TASKS = ("classification", "regression")
SPLITS = ("scaffold", "random", "column")
POOLINGS = ("mean", "first", "max")
CLASS_WEIGHTS = ("none", "balanced")
KEEP = ("best", "last")
#: Metrics of each task; the first one decides which epoch is the best unless another is chosen.
METRICS = {
    "classification": ("roc_auc", "pr_auc", "accuracy", "mcc", "f1"),
    "regression": ("rmse", "mae", "r2", "pearson", "spearman"),
    "answers": ("f1", "em", "best_f1", "best_em", "answerable_f1", "answerable_em", "unanswerable_em"),
}
#: Metrics of which a smaller value is better.
ERRORS = ("rmse", "mae")


@dataclass(frozen=True)
class TrainingSettings:
    """How the members of an ensemble are trained. ConfigError for values out of range."""

    epochs: int = 30  # at most; the rate falls to 0 over all of them
    batch: int = 32  # rows of an optimizer step
    lr: float = 5e-4  # highest rate, of the head and without layer_decay of all layers
    weight_decay: float = 0.01  # of matrices
    warmup: float = 0.06  # fraction of the steps in which the rate rises
    clip: float = 1.0  # largest norm of the gradient; 0: any
    dropout: float = 0.1  # in the head; the body has that of its pretraining
    patience: int = 10  # epochs without a better validation metric after which a member ends; 0: never
    pooling: str = "mean"  # of the hidden states of a sequence
    seeds: int = 1  # members of the ensemble
    seed: int = 0  # of the first member; the others count on from it
    metric: str | None = None  # decides which epoch is the best; None: roc_auc or rmse
    keep: str = "best"  # the weights of the best epoch, or of the last one
    class_weights: str = "none"  # balanced: every class of a target has equal weight in the loss
    scale_targets: bool = True  # regression learns (value - mean) / sd of the training part
    frozen: bool = False  # train the head alone
    layer_decay: float = 1.0  # the rate of a layer is this times that of the layer above it

    def __post_init__(self) -> None:
        ranges = {
            "epochs": (1, None),
            "batch": (1, None),
            "weight_decay": (0, None),
            "warmup": (0, 1),
            "clip": (0, None),
            "dropout": (0, 0.95),
            "patience": (0, None),
            "seeds": (1, 1000),
            "seed": (0, None),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not value >= low or (high is not None and value > high):
                raise ConfigError(f"{name} = {value}: must be {low} or more{f', {high} at most' if high else ''}.")
        if not 0 < self.lr < 1 or not 0 < self.layer_decay <= 1:
            raise ConfigError(
                f"lr = {self.lr}, layer_decay = {self.layer_decay}: both must be above 0, lr below 1 and layer_decay "
                "1 at most."
            )
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("class_weights", self.class_weights, CLASS_WEIGHTS)
        _one_of("keep", self.keep, KEEP)
        if self.metric is not None:
            _one_of("metric", self.metric, tuple(name for names in METRICS.values() for name in names))

    def for_task(self, task: str) -> TrainingSettings:
        """With the metric that decides which epoch is the best. ConfigError for settings that are none of the task."""
        metric = self.metric or METRICS[task][0]
        if metric not in METRICS[task]:
            raise ConfigError(f"metric = {metric!r} is none of {task}, which has {', '.join(METRICS[task])}.")
        if task != "classification" and self.class_weights != "none":
            raise ConfigError(f"class_weights = {self.class_weights!r}: {task} has no classes.")
        return replace(self, metric=metric)


@dataclass(frozen=True)
class SplitSettings:
    """How rows are divided up into a training, a validation and a test part. ConfigError for values out of range."""

    kind: str | None = None  # None: scaffold for molecules, random for texts
    column: str | None = None  # of kind 'column': the column that says train, valid or test
    sizes: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 0  # of the random split
    chirality: bool = True  # whether scaffolds that differ in their stereo centres are different ones

    def __post_init__(self) -> None:
        if self.kind is not None:
            _one_of("split", self.kind, SPLITS)
        if (self.kind == "column") != (self.column is not None):
            raise ConfigError("split: `column` needs the name of the column, and no other kind has one.")
        if self.seed < 0:
            raise ConfigError(f"split seed = {self.seed}: must be 0 or more.")
        if len(self.sizes) != 3 or min(self.sizes) < 0 or abs(sum(self.sizes) - 1) > 1e-6:
            raise ConfigError(
                f"split sizes {' '.join(map(str, self.sizes))}: must be three fractions, train, valid and test, that "
                "sum to 1, as in 0.8 0.1 0.1."
            )
        if not self.sizes[0] or not self.sizes[1]:
            raise ConfigError("split sizes: the training and the validation part must not be empty.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(allowed)}.")


#: What holds where the user says nothing.
DEFAULT_TRAINING, DEFAULT_SPLIT = TrainingSettings(), SplitSettings()
