"""`evaluate_masked`: checkpoints x ratios of masked tokens x seeds in one call, which goes on after a kill.

Nothing is trained. Cells, processes and the folder are those of the other suites; the tasks are

    ratios      a fraction of the tokens is masked
    repeated    of plain models, at the ratio p and with the copies k of each token that they were trained with
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exlm_dist.checkpoint.reader import TOKENIZER_FOLDER, find_checkpoint, read_config
from exlm_dist.config import RunConfig
from exlm_dist.suites.catalogue import SUITES
from exlm_dist.suites.cells import Cell, read_result
from exlm_dist.suites.evaluate_suite import Summary, compute_orders, find_slots
from exlm_dist.suites.masked_cell import MASKED, MaskedOrder
from exlm_dist.suites.masked_data import (
    MaskedSource,
    choose_samples,
    described_rows,
    find_source,
    longest_sequence,
)
from exlm_dist.suites.methods import RANDOM, Method, find_checkpoints
from exlm_dist.suites.out_folder import TASKS, open_folder
from exlm_dist.suites.worker_pool import Outcome
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.utils.errors import ConfigError
from exlm_dist.utils.files import write_json

RATIOS, REPEATED = "ratios", "repeated"
TASK_NAMES = (RATIOS, REPEATED)
DEFAULT_RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
Points = Sequence[tuple[float, int]]


@dataclass(frozen=True)
class MaskedRequest:
    """What is to be evaluated, as `exlm evaluate masked` is given it.

    Args:
        checkpoints: run folders and checkpoints. watched: a run whose checkpoints are evaluated as they land. data: a
        folder of prepared data or a file; None: what the checkpoints were trained on. split: of prepared data; None:
        the validation part. column: of a file. seeds: of the masks. complete: sequences of which completions are
        searched. jobs, device, pinned: as in `SuiteRequest`.
    """

    checkpoints: Sequence[str]
    out: Path
    watched: Path | None = None
    data: Path | None = None
    split: str | None = None
    column: str | None = None
    tasks: Sequence[str] = (RATIOS,)
    ratios: Sequence[float] = DEFAULT_RATIOS
    sequences: int = 500
    complete: int = 100
    seeds: int = 1
    jobs: int | None = None
    device: str = "auto"
    pinned: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise ConfigError(f"--ratios {ratio:g}: must be above 0 and below 1.")
        if self.sequences < 1 or self.complete < 0:
            raise ConfigError("--sequences must be at least 1, and --complete at least 0.")
        if unknown := [name for name in self.tasks if name not in TASK_NAMES]:
            raise ConfigError(f"{MASKED} has no task {unknown[0]!r}; it has {', '.join(TASK_NAMES)}.")
        untrained = {RANDOM} | {baseline.name for suite in SUITES.values() for baseline in suite.baselines}
        if named := [name for name in self.checkpoints if name in untrained]:
            raise ConfigError(f"{MASKED} is of trained masked language models: leave out `{named[0]}`.")


def evaluate_masked(request: MaskedRequest, say: Callable[[str], None] = print) -> Summary:
    """Compute all cells of the request that have no result yet. A cell that fails is recorded with its reason and
    costs the others nothing. Errors: see `find_checkpoints`, `find_source`, `open_folder`, `choose_samples`."""
    source = open_masked(request)
    methods = find_checkpoints(request.checkpoints, pinned=request.pinned)
    orders = [order for task in request.tasks for order in _orders(request, source, task, methods, say)]
    if not orders:
        raise ConfigError(
            f"none of the checkpoints has the tasks {', '.join(request.tasks)}: {RATIOS} is of models that were "
            f"trained with masking.copies 1, {REPEATED} of plain ones."
        )
    # Those of a checkpoint one after another, so that it is loaded once.
    orders.sort(key=lambda order: methods.index(order.cell.method))
    return compute_orders(orders, find_slots(request.device, request.jobs), 0, say, _said)


def open_masked(request: MaskedRequest) -> MaskedSource:
    """Find the data of a request, and make its folder or go on in it. Errors: see `find_source`, `open_folder`."""
    source = find_source(request.data, request.split, request.column, _configs(request))
    asked = {
        "suite": MASKED,
        "part": source.part,
        "data_sha256": source.fingerprint,
        "sequences": request.sequences,
        "complete": request.complete,
    }
    open_folder(request.out, asked)
    return source


def _configs(request: MaskedRequest) -> list[tuple[str, RunConfig]]:
    """(name, settings) of all that is evaluated, and of the run whose checkpoints will be."""
    found = [(name, read_config(find_checkpoint(request.pinned.get(name, Path(name))))) for name in request.checkpoints]
    if request.watched is not None:
        found.append((str(request.watched), read_config(request.watched)))
    return found


def _points(request: MaskedRequest, task: str, config: RunConfig) -> Points:
    """(ratio, copies) that a model is asked for; none if it does not have the task."""
    masking = config.masking
    if task == REPEATED:
        return [(masking.ratio, masking.copies)] if config.model.objective == "mlm" else []
    return [(ratio, 1) for ratio in sorted(set(request.ratios))] if masking.copies == 1 else []


def _orders(
    request: MaskedRequest,
    source: MaskedSource,
    task: str,
    methods: Sequence[Method],
    say: Callable[[str], None],
) -> list[MaskedOrder]:
    """The cells of a task, on sequences that all its checkpoints take at all its points."""
    points = {method.key: _points(request, task, read_config(_files(method))) for method in methods}
    own = [method for method in methods if points[method.key]]
    if not own:
        return []
    longest = _prepared(request, source, task, own, say)
    return [
        MaskedOrder(
            request.out, source, request.sequences, longest, complete, Cell(task, source.part, method, grid, seed)
        )
        for method in own
        for seed in range(request.seeds)
        for ratio, copies in points[method.key]
        for grid, complete in [_grid(task, ratio, copies, request.complete)]
    ]


def _grid(task: str, ratio: float, copies: int, complete: int) -> tuple[tuple[tuple[str, float | int], ...], int]:
    """(grid of a cell, sequences of which completions are searched: of repeated tokens none)."""
    if task == RATIOS:
        return (("ratio", ratio),), complete
    return (("copies", copies), ("ratio", ratio)), 0


def _prepared(
    request: MaskedRequest,
    source: MaskedSource,
    task: str,
    methods: Sequence[Method],
    say: Callable[[str], None],
) -> int:
    """Record which sequences a task has, the first time; the most tokens that they have. ConfigError if they do not fit
    one of the checkpoints, or its tokenizer is another one."""
    path = request.out / TASKS / f"{task}.json"
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    configs = [read_config(_files(method)) for method in methods]
    if request.watched is not None:
        configs.append(read_config(request.watched))
    longest = longest_sequence([(config, _points(request, task, config)) for config in configs])
    known = recorded or {"tokenizer": methods[0].facts["tokenizer"], "tokenizer_of": methods[0].label}
    for method in methods:
        if method.facts["tokenizer"] != known["tokenizer"]:
            raise ConfigError(
                f"{method.checkpoint} has another tokenizer than {known['tokenizer_of']}, so it cannot be asked for "
                "the same tokens. Evaluate it in another --out."
            )
    if recorded is not None and longest < recorded["longest"]:
        raise ConfigError(
            f"{request.out} was begun with sequences of up to {recorded['longest']} tokens, but at these ratios one of "
            f"the checkpoints takes {longest} at most. Give all checkpoints and ratios at once in another --out."
        )
    if recorded is not None:
        return recorded["longest"]
    dataset = source.open(load_tokenizer(_files(methods[0]) / TOKENIZER_FOLDER))
    samples, skipped = choose_samples(dataset, longest, request.sequences)
    sizes = {"longest": longest, "sequences": len(samples), "skipped": skipped}
    (request.out / TASKS).mkdir(exist_ok=True)
    rows = described_rows(dataset)
    write_json(path, {"file": str(source.path), "sha256": source.fingerprint, **known, **sizes, **rows})
    say(f"{task}: {len(samples)} sequences of {source.path} ({source.part}){_left_out(skipped, longest, rows)}")
    return longest


def _files(method: Method) -> Path:
    assert method.checkpoint is not None  # all methods of this suite are checkpoints
    return method.checkpoint


def _left_out(skipped: int, longest: int, rows: Mapping[str, Any]) -> str:
    long = f"; {skipped} longer than {longest} tokens left out, which a checkpoint does not take" if skipped else ""
    failed = rows.get("rows", {}).get("failed", 0)
    return long + (f"; {failed} rows cannot be used (first: {rows['reasons'][0]})" if failed else "")


def _said(outcome: Outcome) -> str:
    result = read_result(outcome.order.cell.path(outcome.order.out))
    ((_, scores),) = result["scores"].items()
    figures = [f"nll {scores['nll']:.4f}", f"joint {scores['joint_nll']:.4f}", f"accuracy {scores['accuracy']:.2%}"]
    if "valid_best" in scores:
        figures.append(f"readable {scores['valid_best']:.1%}")
    return f"{', '.join(figures)}, {result['seconds']:.1f} s"
