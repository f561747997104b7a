"""What ranks noted of the samples they saw."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from exlm_dist.training.sample_log import FOLDER, SampleLog, samples_of_steps
from exlm_dist.utils.errors import DataError


def note(folder, rank, world, *steps):
    """One launch of a rank: (step, ids of each micro-batch) ..."""
    log = SampleLog(folder, rank, world)
    for step, *batches in steps:
        log.write(SimpleNamespace(step=step, sample_ids=[np.array(ids) for ids in batches]))
    log.close()


def test_a_step_counts_once_all_ranks_of_a_launch_have_completed_it(tmp_path):
    note(tmp_path, 0, 2, (0, [4], [1]), (1, [7, 3]))
    note(tmp_path, 1, 2, (0, [2], [9]))  # killed in step 1
    assert samples_of_steps(tmp_path) == {0: [1, 2, 4, 9]}
    with open(tmp_path / FOLDER / "rank-00001.jsonl", "a") as file:
        file.write('{"step": 1, "ra')  # killed while writing
    note(tmp_path, 0, 2, (1, [7, 3]))
    note(tmp_path, 1, 2, (1, [5, 6]))
    note(tmp_path, 0, 1, (1, [3, 5, 6, 7]), (2, [8]))  # on one rank from here
    assert samples_of_steps(tmp_path) == {0: [1, 2, 4, 9], 1: [3, 5, 6, 7], 2: [8]}


@pytest.mark.parametrize("world, ids", [(2, [7, 4]), (1, [1])])
def test_other_samples_in_the_same_step_are_an_error(world, ids, tmp_path):
    note(tmp_path, 0, 2, (1, [7, 3]))
    note(tmp_path, 1, 2, (1, [5]))
    note(tmp_path, 0, world, (1, ids))
    with pytest.raises(DataError, match="step 1 saw other samples"):
        samples_of_steps(tmp_path)
