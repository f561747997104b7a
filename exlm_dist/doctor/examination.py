"""The body of `exlm doctor`: which checks are made for a run, or for this machine alone, and their table. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from exlm_dist.config import RunConfig, load_config
from exlm_dist.config.schema import LaunchConfig
from exlm_dist.doctor import machine_checks
from exlm_dist.doctor.findings import Finding, examine, failed, table
from exlm_dist.doctor.rank_checks import check_ranks
from exlm_dist.model.cost import count_parameters
from exlm_dist.planning.report import ASSUMED_VOCABULARY, prepared_sizes
from exlm_dist.tracking.uri import redact, tracking_uri
from exlm_dist.utils.errors import ConfigError, DataError

Checks = list[tuple[str, Callable[[], Finding | list[Finding]]]]


def doctor(path: str | None, overrides: Sequence[str], *, nodes: bool) -> int:
    """Print the findings for the run of a configuration, or for this machine alone; 1 if a check fails, else 0.

    `nodes`: check ranks on all nodes of this Slurm job, not those that `exlm pretrain` would start here.
    """
    checks: Checks = [("packages", machine_checks.check_packages), ("limits", machine_checks.check_limits)]
    launch, runs, processes = LaunchConfig(), Path("."), 2
    if path is not None:
        config = load_config(path, overrides)
        launch, runs, processes = config.launch, Path(config.runs), config.local_processes
        checks += _checks_of_run(config)
    checks += [
        ("port", machine_checks.check_port),
        ("ranks", lambda: check_ranks(launch, runs, processes=None if nodes else processes)),
    ]
    findings = examine(checks)
    print(table(findings))
    return int(failed(findings))


def _checks_of_run(config: RunConfig) -> Checks:
    vocab_size = ASSUMED_VOCABULARY
    with contextlib.suppress(DataError):  # the check of the shards says what is wrong
        vocab_size = prepared_sizes(config.data.paths)[1] or vocab_size
    parameters = sum(count_parameters(config.model, vocab_size).values())

    def tracking() -> Finding:
        try:
            uri = tracking_uri(config.tracking.uri, Path(config.runs))
        except ConfigError as error:
            return machine_checks.unusable_tracking(config, str(error))
        return machine_checks.check_tracking(config, uri, redact(uri))

    return [
        ("weights", lambda: machine_checks.check_initial_weights(config)),
        ("shards", lambda: machine_checks.check_shards(config)),
        ("free space", lambda: machine_checks.check_space(config, parameters)),
        ("disk", lambda: machine_checks.check_disk(config, parameters)),
        ("locks", lambda: machine_checks.check_locks(config)),
        ("tracking", tracking),
        ("time limit", lambda: machine_checks.check_time_limit(config)),
    ]
