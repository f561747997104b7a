"""What `exlm plan` and `exlm config check` print. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from exlm_dist.config import RunConfig, check_init
from exlm_dist.data.manifest import MANIFEST, read_manifest
from exlm_dist.data.mirror import data_folder
from exlm_dist.model.cost import count_parameters, flops_per_sequence
from exlm_dist.planning.communication import GROUPS
from exlm_dist.planning.hardware import Hardware
from exlm_dist.planning.job import Job
from exlm_dist.planning.memory import KINDS, ON_HOST, memory_per_rank
from exlm_dist.planning.planner import GIB, Plan, Request, find_plans, recommended
from exlm_dist.planning.scaling import HOUR, Cluster, scale_table

#: Assumed until the data are prepared.
ASSUMED_LENGTH, ASSUMED_VOCABULARY = 128, 32_000
_SHOWN = KINDS[:-1]  # without compiled products, which only a CPU keeps
_SHORT = {"states and logits": "states", "activations": "activ."}


def prepared_sizes(path: Path) -> tuple[int | None, int | None]:
    """(longest sequence, vocabulary size) of the prepared data in `path`; None for what its manifest does not say, or
    where there is none. DataError for a manifest that cannot be used."""
    if not (data_folder(path) / MANIFEST).is_file():
        return None, None
    content = read_manifest(path)
    return content.get("max_length"), content.get("vocab_size")


def plan_text(
    config: RunConfig, *, gpus: int, memory: float, margin: float, hardware: Hardware,
    length: int | None = None, vocab_size: int | None = None, top: int = 8, cluster: Cluster | None = None,
) -> str:  # fmt: skip
    """Answer of `exlm plan`: the layouts that fit, of each grid the fastest, and the lines to paste into a file.

    `memory` in bytes; `length` and `vocab_size` default to those of the prepared data; with a `cluster` also what to
    expect of the recommended layout on 8 to 4,096 GPUs. ConfigError if nothing fits, or `init` is not there.
    """
    check_init(config)
    length, vocab_size, assumed = _sizes(config, length, vocab_size)
    request = Request(config, vocab_size, length, gpus, memory, margin, hardware)
    plans = find_plans(request)
    best = recommended(plans)
    parameters = sum(count_parameters(config.model, vocab_size).values())
    return "\n".join([
        f"{config.name}: {parameters / 1e6:,.0f} M parameters, {config.batch.sequences} sequences a step of {length} "
        f"tokens ({best.job.sizes.expanded:.0f} expanded), vocabulary {vocab_size}{assumed}",
        f"{gpus} GPUs of {memory / GIB:g} GiB, of which at most {request.usable / GIB:.1f} are used; "
        f"{hardware.node_size} per node; {hardware.flops / 1e12:g} TFLOP/s, memory "
        f"{hardware.memory_bandwidth / 1e9:g}, link {hardware.link_bandwidth / 1e9:g}, "
        f"network {hardware.network_bandwidth / 1e9:g} GB/s",
        f"{len(plans)} layouts fit. The fastest of each grid: GiB of the worst rank, GiB sent in a step by the rank "
        "that sends most; * the one recommended:",
        "",
        *_table(_of_each_grid(plans)[:top], best),
        "",
        _reasons(best),
        "",
        *config_lines(best.config),
        *([] if cluster is None else _on_other_sizes(best, cluster)),
    ])  # fmt: skip


def _on_other_sizes(plan: Plan, cluster: Cluster) -> list[str]:
    return [
        "",
        "The recommended layout with more and fewer replicas, the global batch in proportion: percent of a step, "
        f"goodput with checkpoint.every {plan.config.checkpoint.every} and a failure in "
        f"{cluster.failure / HOUR:,.0f} hours of a GPU, and the checkpoint.every with the best goodput. "
        "(docs/parallelism.md has the assumptions.)",
        "",
        *scale_table(plan.job, plan.hardware, cluster),
    ]


def config_lines(config: RunConfig) -> list[str]:
    """YAML of the settings that make up a layout."""
    parallel = config.parallel
    names = ("tensor", "pipeline", "data", "sequence", "zero", "activation_checkpointing", "offload")
    settings = ", ".join(f"{name}: {json.dumps(getattr(parallel, name))}" for name in names)
    return [f"parallel: {{{settings}}}", f"batch: {{sequences: {config.batch.sequences}, micro: {config.batch.micro}}}"]


def _of_each_grid(plans: list[Plan]) -> list[Plan]:
    """The fastest of each (tensor, pipeline, data)."""
    first: dict[tuple[int, int, int], Plan] = {}
    for plan in plans:
        first.setdefault((plan.job.tensor, plan.job.pipeline, plan.job.data), plan)
    return list(first.values())


def _table(plans: list[Plan], best: Plan) -> list[str]:
    """A row for each plan; `best` is marked, and added if it is not among them."""
    head = ["tensor", "pipe", "data", "seq", "zero", "recomp", "micro", "m"]
    head += [_SHORT.get(kind, kind) for kind in _SHOWN] + ["total"]
    head += [f"{group} GiB" for group in GROUPS] + ["bubble", "step s"]
    shown = plans if best in plans else [*plans, best]
    rows = [["", *head], *(["*" if plan is best else "", *_row(plan)] for plan in shown)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) + 1)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def _row(plan: Plan) -> list[str]:
    parallel, parts = plan.config.parallel, plan.peak.parts
    cells = [str(value) for value in (parallel.tensor, parallel.pipeline, plan.job.data)]
    cells += ["yes" if parallel.sequence else "no", str(parallel.zero)]
    cells += ["yes" if parallel.activation_checkpointing else "no"]
    cells += [str(plan.config.batch.micro), str(plan.job.accumulation)]
    cells += [f"{parts[kind] / GIB:.1f}" if kind in parts else "-" for kind in _SHOWN]
    cells += [f"{plan.peak.total / GIB:.1f}"]
    for group in GROUPS:
        sent = sum(traffic.sent for traffic in plan.traffic if traffic.group == group)
        cells.append(f"{sent / GIB:.2f}" if sent else "-")
    return [*cells, f"{plan.bubble:.0%}" if plan.job.pipeline > 1 else "-", f"{plan.time.total:.3f}"]


def _reasons(plan: Plan) -> str:
    """How the time is spent, and when memory peaks."""
    spent = {name: seconds for name, seconds in vars(plan.time).items() if seconds > 0.0005}
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in spent.items())
    host = sum(plan.peak.parts.get(kind, 0.0) for kind in ON_HOST) / GIB
    return (
        f"Recommended: {plan.time.total:.3f} s per step ({parts}); memory peaks at the {plan.peak.moment}, "
        f"stage {plan.peak.stage}. Each rank also takes {host:.1f} GiB of host memory."
    )


def _sizes(config: RunConfig, length: int | None, vocab_size: int | None) -> tuple[int, int, str]:
    """(length, vocabulary, a remark if they come neither from the data nor from the caller)."""
    known_length, known_vocabulary = prepared_sizes(Path(config.data.path))
    if known_length is not None:
        known_length = config.masking.copies * (known_length - 2) + 2
    unknown = [
        name for name, given in (("--length", length or known_length), ("--vocab-size", vocab_size or known_vocabulary))
        if not given
    ]  # fmt: skip
    remark = f" (assumed, as {config.data.path} is not prepared: set it by {' and '.join(unknown)})"
    found = length or known_length or ASSUMED_LENGTH, vocab_size or known_vocabulary or ASSUMED_VOCABULARY
    return *found, remark if unknown else ""


def cost_table(config: RunConfig, vocab_size: int, length: int, world: int) -> list[tuple[str, str]]:
    """Rows (quantity, value) of `exlm config check`, for sequences of `length` tokens on `world` ranks."""
    job = Job(config, vocab_size, length, world, gpu=config.launch.device != "cpu")
    parameters = count_parameters(config.model, vocab_size)
    flops = flops_per_sequence(config.model, vocab_size, job.sizes)
    peak, total, sizes = memory_per_rank(job), sum(flops.values()), job.sizes
    accumulation = config.batch.sequences / (job.data * config.batch.micro)
    device = "GPU" if job.gpu else "CPU"
    return [
        ("sequence length, vocabulary", f"{length}, {vocab_size}"),
        ("parameters", f"{sum(parameters.values()):,} ({_parts(parameters, 1e6, 'M')})"),
        (
            "expanded length (expected)",
            f"{sizes.expanded:.1f} tokens, {sizes.states:.1f} states, {sizes.targets:.1f} targets",
        ),
        ("FLOPs per sequence", f"{total / 1e9:.4g} GF ({_parts(flops, 1e9, 'GF')})"),
        ("FLOPs per step", f"{total * config.batch.sequences / 1e12:.4g} TF for {config.batch.sequences} sequences"),
        ("micro-batches per rank and step", f"{accumulation:g} on {world} ranks of {config.batch.micro} sequences"),
        (
            f"memory per rank ({device}, predicted)",
            f"{peak.total / 2**20:,.0f} MiB at the {peak.moment} ({_parts(peak.parts, 2**20, 'MiB')})",
        ),
    ]


def describe(config: RunConfig, *, world: int = 1, length: int | None = None, vocab_size: int | None = None) -> str:
    """The cost table as text; `length` and `vocab_size` default to those of the prepared data, else 128 and 32000.
    ConfigError if `init` is not there."""
    check_init(config)
    length, vocab_size, _ = _sizes(config, length, vocab_size)
    rows = cost_table(config, vocab_size, length, world)
    left = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{left}}  {value}" for name, value in rows)


def _parts(parts: Mapping[str, float], unit: float, symbol: str) -> str:
    return ", ".join(f"{name} {value / unit:.4g}" for name, value in parts.items()) + f" {symbol}"
