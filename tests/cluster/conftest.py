"""One Slurm of eight nodes for all tests of this folder."""

from __future__ import annotations

import pytest
from cluster.slurm_testbed import Slurm, why_not


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A real Slurm; the tests are skipped, with the reason, where there can be none."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    bed = Slurm(tmp_path_factory.mktemp("slurm"), nodes=8)
    yield bed
    bed.down()
