"""One Slurm of 32 nodes for all tests of this folder."""

from __future__ import annotations

import pytest
from cluster.scenarios import SCENARIOS, submit
from cluster.slurm_testbed import Job, Slurm, why_not


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A real Slurm; without one the tests are skipped, with the reason."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    bed = Slurm(tmp_path_factory.mktemp("slurm"), nodes=32)
    yield bed
    bed.down()


@pytest.fixture(scope="session")
def scenarios(slurm: Slurm) -> dict[str, Job]:
    """The jobs of `cluster.scenarios`, submitted at once."""
    return {name: submit(slurm, name) for name in SCENARIOS}
