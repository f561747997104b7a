"""The command `exlm doctor`: brings together what the rooms know and the checks of `exlm_dist.doctor.findings*`. No
torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from exlm_dist.config import RunConfig, load_config
from exlm_dist.config.schema import LaunchConfig
from exlm_dist.doctor import machine_checks as doctor_checks
from exlm_dist.doctor.findings import Finding, examine, failed, table
from exlm_dist.doctor.rank_checks import check_ranks
from exlm_dist.model.cost import count_parameters
from exlm_dist.planning.report import prepared_sizes
from exlm_dist.tracking.uri import redact, tracking_uri

#: Where the data are not there yet.
VOCABULARY = 32000
Checks = list[tuple[str, Callable[[], Finding | list[Finding]]]]


def doctor(path: str | None, overrides: Sequence[str], *, nodes: bool) -> int:
    """Print the table of findings for the run of a configuration, or for the machine alone; 1 where a check fails.

    `nodes`: ranks on all nodes of this Slurm job instead of those that `exlm pretrain` starts here.
    """
    checks: Checks = [("packages", doctor_checks.check_packages), ("limits", doctor_checks.check_limits)]
    launch, runs, processes = LaunchConfig(), Path("."), 2
    if path is not None:
        config = load_config(path, overrides)
        launch, runs, processes = config.launch, Path(config.runs), config.local_processes
        checks += _checks_of_run(config)
    checks += [
        ("port", doctor_checks.check_port),
        ("ranks", lambda: check_ranks(launch, runs, processes=None if nodes else processes)),
    ]
    findings = examine(checks)
    print(table(findings))
    return int(failed(findings))


def _checks_of_run(config: RunConfig) -> Checks:
    vocab_size = prepared_sizes(Path(config.data.path))[1] or VOCABULARY
    parameters = sum(count_parameters(config.model, vocab_size).values())

    def tracking() -> Finding:
        uri = tracking_uri(config.tracking.uri, Path(config.runs))
        return doctor_checks.check_tracking(config, uri, redact(uri))

    return [
        ("shards", lambda: doctor_checks.check_shards(config)),
        ("free space", lambda: doctor_checks.check_space(config, parameters)),
        ("disk", lambda: doctor_checks.check_disk(config, parameters)),
        ("tracking", tracking),
        ("time limit", lambda: doctor_checks.check_time_limit(config)),
    ]
