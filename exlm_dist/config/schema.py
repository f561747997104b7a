"""Every setting of a run, once: types, ranges, defaults and the sentence that documents it.

`docs/configuration.md` is generated from this file. No torch, so that a login node can read it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from exlm_dist.config.setting_types import AutoCount, AutoSteps, RunName, Section, UserPath, renamed_backend

#: Width and floor of each prior over jumps where they are 0.
JUMP_SHAPES = {"gaussian": (1.0, 8.0), "laplace": (1.0, 8.0), "group": (0.125, 12.0)}
#: The models for which the prior `auto` is one.
_DENSE = {"objective": "exlm", "transitions": "dense"}


class DataConfig(Section):
    """Where the prepared shards are and how they are read."""

    path: UserPath = Field(
        description="Folder written by `exlm prepare` or `exlm data index`: manifest, tokenizer, index, shards; or its address (http, s3, gs, hf)."
    )
    bucket: int = Field(
        1,
        ge=1,
        description="Packed sizes T, S and N are rounded up to a multiple of this (1: exact sizes); repeating shapes let a GPU replay one graph.",
    )
    prefetch: int = Field(
        2, ge=0, le=64, description="Global steps packed ahead by a background thread; 0 packs in the training thread."
    )
    workers: int = Field(
        2,
        ge=0,
        le=64,
        description="Processes of each rank that read and tokenize shards of `exlm data index`; 0 does it in the background thread. Prepared shards need none.",
    )
    shuffle: Literal["full", "windows"] = Field(
        "full",
        description="Order of the samples of an epoch. full: one permutation of all; windows: blocks of consecutive samples are permuted, and the samples within each window of them, so that data of any size is read in blocks (docs/data-order.md).",
    )
    block: int = Field(512, ge=1, description="Consecutive samples that are read as one block (shuffle windows).")
    window: int = Field(1024, ge=1, description="Blocks whose samples are permuted as one window (shuffle windows).")
    max_bad_records: float = Field(
        1e-4,
        ge=0,
        le=1,
        description="Fraction of damaged records (checksum mismatch) above which the run stops; below it each is reported and replaced by another, always the same one.",
    )


class MaskingConfig(Section):
    """Which tokens are masked. A pure function of (seed, epoch, sample id)."""

    ratio: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="Fraction of the ordinary tokens of a sequence that are masked in training; at least one token.",
    )
    schedule: tuple[tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0, lt=1)]], ...] = Field(
        (),
        description="Points [step, ratio] through which `ratio` changes from step 0 on, linearly, and stays after the last; two points at one step make it jump (docs/masking.md).",
    )
    spread: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="The ratio of each sequence is drawn from ratio - spread to ratio + spread, uniformly; 0: the same for all.",
    )
    unit: Literal["token", "word", "atom", "ring"] = Field(
        "token",
        description="What is masked as a whole: tokens; words (text: what spaces separate); atoms with bond and ring closures, or rings (SMILES).",
    )
    span_p: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Mask spans of consecutive units, with lengths geometric in this p (SpanBERT: 0.2); 0: single units.",
    )
    longest_span: int = Field(10, ge=1, le=1000, description="Units in the longest span.")
    eval_ratio: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="The same for evaluation, so that runs with other training ratios stay comparable.",
    )
    keep: float = Field(
        0.0, ge=0, le=1, description="Fraction of the masked positions that keep their token (BERT: 0.1)."
    )
    random: float = Field(
        0.0, ge=0, le=1, description="Fraction of the masked positions that get a random ordinary token (BERT: 0.1)."
    )
    copies: int = Field(
        1,
        ge=1,
        le=8,
        description="Times that each token stands side by side; each copy is masked by itself (repeated MLM, for the study in docs/masked.md; needs model.objective mlm).",
    )


class ModelConfig(Section):
    """Architecture and objective."""

    objective: Literal["exlm", "mlm"] = Field(
        "exlm",
        description="exlm: likelihood of the masked tokens summed over all paths through the states; mlm: cross-entropy at each masked position (needs states 1, anchors false).",
    )
    layers: int = Field(12, ge=1, description="Transformer blocks.")
    width: int = Field(768, ge=4, description="Model width D.")
    heads: int = Field(
        12,
        ge=1,
        description="Attention heads; also the heads of the transition head. width / heads must be divisible by 4.",
    )
    ffn: int = Field(3072, ge=1, description="Inner width of the feed-forward.")
    states: int = Field(4, ge=1, le=16, description="States k per masked position (paper: 4 is best, 2 to 8 tried).")
    transitions: Literal["dense", "sparse", "uniform"] = Field(
        "dense",
        description="dense: learned, to any later state; sparse: learned, only to the states of the next expanded position; uniform: not learned (ablation without transitions).",
    )
    jump_prior: Literal["auto", "none", "gaussian", "laplace", "group"] = Field(
        "auto",
        description="Fixed prior of the learned transitions over the length of a jump. It favours jumps of k states (gaussian, laplace), or to the next group of k (group); none: the authors' form, with which paths run to the last states early; auto: group for dense transitions, else none.",
    )
    jump_width: float = Field(
        0.0,
        ge=0,
        description="Standard deviation of gaussian and scale of laplace, in states; scale of group, in groups; 0: 1 (gaussian, laplace) or 0.125 (group).",
    )
    jump_floor: float = Field(
        0.0,
        ge=0,
        description="The most that the prior takes from the score of a jump, in nats; 0: 8 (gaussian, laplace) or 12 (group).",
    )
    transition_positions: bool = Field(
        True,
        description="Give the transition head a learned embedding of the position in the expanded sequence beside the features.",
    )
    rotary: Literal["2d", "1d"] = Field(
        "2d",
        description="2d: half the head width is rotated by the position, half by the clone index; 1d: all of it by the position in the expanded sequence (ablation).",
    )
    anchors: bool = Field(
        True,
        description="Expand BOS and EOS too and make them the first and last target, so that every path starts and ends at a known state.",
    )
    norm: Literal["pre", "post"] = Field(
        "pre", description="LayerNorm before each sub-layer or after each residual sum."
    )
    tie_head: bool = Field(True, description="The token head uses the embedding matrix.")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="On embeddings and on the output of attention and feed-forward."
    )
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="On the attention weights.")
    max_positions: int = Field(
        2048, ge=8, description="Largest expanded length; rows of the learned position table of the transition head."
    )
    init_std: float = Field(0.02, gt=0, description="Standard deviation of the initial linear and embedding weights.")

    @model_validator(mode="before")
    @classmethod
    def _shape_of_the_prior(cls, given: Any) -> Any:
        """The prior that auto stands for, and numbers for what is 0: so that what is stored with a run does not depend
        on the defaults of a later version."""
        if not isinstance(given, dict):
            return given
        kind = given.get("jump_prior", cls.model_fields["jump_prior"].default)
        if kind == "auto":
            is_dense = all(given.get(key, cls.model_fields[key].default) == value for key, value in _DENSE.items())
            kind = "group" if is_dense else "none"
            given = given | {"jump_prior": kind}
        shape = zip(("jump_width", "jump_floor"), JUMP_SHAPES.get(str(kind), ()))
        return given | {key: value for key, value in shape if given.get(key, 0) == 0}


class BatchConfig(Section):
    """Sizes in sequences. What is in a global batch does not depend on the number of ranks."""

    sequences: int = Field(256, ge=1, description="Sequences per optimizer step over all ranks (the global batch).")
    micro: int = Field(
        32,
        ge=1,
        description="Sequences per micro-batch; data-parallel ranks x micro must divide the global batch, the quotient is the number of accumulated micro-batches.",
    )


class LossConfig(Section):
    """Normalisation over the global batch."""

    reduction: Literal["sequence", "token"] = Field(
        "sequence",
        description="sequence: mean over sequences of -log P / number of targets (the authors'); token: sum of -log P / sum of targets.",
    )
    max_invalid: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Fraction of sequences without a finite likelihood in a step above which the run stops; below it they are counted, reported and left out.",
    )


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(5e-4, gt=0, description="Peak learning rate.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.98, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(1e-6, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay, on every parameter (as the authors).")
    clip: float = Field(0.0, ge=0, description="Largest norm of the global gradient; 0: no clipping.")


class ScheduleConfig(Section):
    """Learning rate as a pure function of the step."""

    steps: int = Field(ge=1, description="Optimizer steps of the whole run.")
    warmup: int = Field(0, ge=0, description="Steps of linear warm-up from 0.")
    kind: Literal["linear", "cosine", "inverse_sqrt", "wsd", "constant"] = Field(
        "linear",
        description="Shape after the warm-up; wsd: constant, then a decay to `final` over the last fraction `decay` of the run.",
    )
    final: float = Field(
        0.0, ge=0, le=1, description="Rate at the end as a fraction of the peak (linear, cosine, wsd)."
    )
    decay: float = Field(0.1, gt=0, le=1, description="Fraction of the run that wsd spends decaying.")


class PrecisionConfig(Section):
    """Working precision. Softmax, log-sum-exp, rotary angles and the dynamic programme are always fp32."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU that has it, fp32 on a CPU."
    )


class ParallelConfig(Section):
    """Layout over ranks: tensor x pipeline x data ranks in all (docs/parallelism.md)."""

    tensor: int = Field(
        1, ge=1, description="Ranks over which each layer is split: attention heads, feed-forward and vocabulary."
    )
    pipeline: int = Field(
        1, ge=1, description="Stages into which the layers are cut, one rank (or tensor-parallel group) each."
    )
    data: AutoCount = Field(
        "auto",
        description="Replicas of the model, over which the global batch is split; auto: ranks / (tensor x pipeline).",
    )
    sequence: bool = Field(
        False,
        description="Split norms, dropout and residuals along the tokens within a tensor-parallel group (needs tensor > 1).",
    )
    zero: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also parameters."
    )
    offload: bool = Field(False, description="Keep optimizer states in host memory.")
    activation_checkpointing: bool = Field(
        False, description="Recompute each block in the backward pass instead of keeping its activations."
    )


class KernelConfig(Section):
    """Implementation of the four operations of `exlm_dist.kernels`."""

    backend: Annotated[Literal["auto", "triton", "torch"], BeforeValidator(renamed_backend)] = Field(
        "auto", description="auto: Triton on a GPU, plain torch elsewhere."
    )


class CheckpointConfig(Section):
    """When a run is saved, and which checkpoints are kept."""

    every: int = Field(1000, ge=1, description="Steps between checkpoints; the last step is always saved.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")
    best: bool = Field(True, description="Keep the one with the lowest evaluation nll as well.")
    asynchronous: bool = Field(
        True,
        description="Write in a process beside each rank while training continues, instead of waiting; either way from a copy in host memory, 12 bytes for each parameter that the rank owns.",
    )
    timeout: int = Field(
        900, ge=1, description="Seconds after which a save that is still being written counts as failed."
    )


class EvaluationConfig(Section):
    """Evaluation on the held-out split during training."""

    every: int = Field(1000, ge=0, description="Steps between evaluations; 0: only after the last step.")
    sequences: int = Field(
        1024,
        ge=1,
        description="Held-out sequences used (the first ones; fewer if the split is smaller).",
    )


class TrackingConfig(Section):
    """Metrics, plots and where they go. `events.jsonl` in the run folder is always written."""

    mlflow: bool = Field(True, description="Send the events to MLflow.")
    uri: str = Field(
        "",
        description="MLflow tracking URI; empty: MLFLOW_TRACKING_URI, else SQLite `mlflow.db` in the folder of runs.",
    )
    experiment: str = Field("exlm", description="MLflow experiment.")
    every: int = Field(10, ge=1, description="Steps between logged points.")
    system: bool = Field(True, description="Log CPU, memory and GPU load of the node of rank 0.")
    samples: bool = Field(
        False,
        description="Every data-parallel rank writes the ids of the samples of each step to `samples/` in the run folder, as proof of what was trained on.",
    )


class LaunchConfig(Section):
    """How processes are started and how long they may wait. Never part of what a run computes."""

    processes: AutoCount = Field(
        "auto",
        description="Local processes that `exlm pretrain` starts if no launcher has set RANK; auto, or fewer than that: parallel.tensor x parallel.pipeline x parallel.data (1 if that is auto).",
    )
    timeout: int = Field(600, ge=5, description="Seconds after which a collective that waits for another rank fails.")
    threads: int = Field(0, ge=0, description="CPU threads per process; 0: cores / local processes.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if there is a GPU.")
    recheck: AutoSteps = Field(
        "auto",
        description="Steps between checks that another replica computes the same gradient, to the bit (docs/operations.md); a step after which a checkpoint is due is checked too; 0: never; auto: 100 from two nodes on, on devices of one kind, without stages and with at most two tensor ranks.",
    )
    restarts: int = Field(
        3,
        ge=0,
        le=100,
        description="Restarts in place after a lost rank, in a row without a newer checkpoint; then exit code 78. 0: never.",
    )
    time_limit: float = Field(
        0.0,
        ge=0,
        description="Minutes after its start at which the job will be ended from outside; 0: as Slurm says, else no limit.",
    )
    margin: float = Field(
        30.0,
        ge=0,
        description="Seconds before the end of the job by which the last checkpoint must be written; the time for a step and a save is added.",
    )


class WatchdogConfig(Section):
    """How long a rank may make no progress before the job is ended (exit code 76). Seconds; 0: no limit. Keep them below
    `launch.timeout`, so that the rank that hangs is reported before the others give up waiting for it."""

    start: int = Field(
        540,
        ge=0,
        description="For each part of the start: imports, meeting the other ranks, data, checkpoint, model, weights, first step.",
    )
    step: int = Field(300, ge=0, description="For one micro-batch, or the reduction and update at the end of a step.")
    save: int = Field(540, ge=0, description="For one checkpoint.")
    evaluation: int = Field(540, ge=0, description="For one batch of an evaluation.")
    end: int = Field(300, ge=0, description="For the end of the run, after the last checkpoint.")


class RunConfig(Section):
    """One run: everything that decides what it computes and where it is stored."""

    name: RunName = Field(description="Name of the run and of its folder.")
    runs: UserPath = Field("runs", description="Folder of the run folders.")
    seed: int = Field(0, ge=0, lt=2**63, description="Decides initial weights, sample order, masks and dropout.")
    init: UserPath = Field(
        "",
        description="Checkpoint whose weights a new run starts with: a run or checkpoint folder, or a folder of `exlm export hf` (docs/training.md); empty: initial weights that `seed` decides.",
    )
    budget: str = Field(
        "", description="Label of the compute budget that every printed result carries (say `dinky-23k`)."
    )
    data: DataConfig
    masking: MaskingConfig = MaskingConfig()
    model: ModelConfig = ModelConfig()
    batch: BatchConfig = BatchConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelConfig = KernelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    launch: LaunchConfig = LaunchConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @property
    def local_processes(self) -> int:
        """Processes that a launcher starts on this machine by default."""
        replicas = 1 if self.parallel.data == "auto" else self.parallel.data
        needed = self.parallel.tensor * self.parallel.pipeline * replicas
        return needed if self.launch.processes == "auto" else max(needed, self.launch.processes)
