"""Small collectives among the ranks; an error of one rank ends all."""

from __future__ import annotations

import numpy as np
import pytest
from parallel.harness import RankFailed, on_ranks, run_processes

from exlm_dist.utils.errors import CHOSEN_PORT, EXIT_DATA, EXIT_RETRY, EXIT_STOP, EXIT_USAGE, DataError, RunStopped


def agreements(process):
    return (
        process.all_gather([process.rank, 7.0]).tolist(),
        process.any(process.rank == 1),
        process.any(False),
        process.broadcast_object({"text": "wörld", "empty": []} if process.is_first else None),
        process.run_on_first_rank(lambda: process.rank),
        process.broadcast_object(""),
    )


def test_agreements():
    rows = [[0.0, 7.0], [1.0, 7.0], [2.0, 7.0]]
    assert on_ranks(agreements, 3) == [(rows, True, False, {"text": "wörld", "empty": []}, 0, "")] * 3


def first_fails(process):
    class Special(RunStopped):
        pass

    def work():
        raise Special("enough")

    process.run_on_first_rank(work)


def test_an_error_of_rank_0_is_raised_everywhere_with_its_exit_code():
    with pytest.raises(RankFailed, match="enough") as caught:
        on_ranks(first_fails, 2)
    assert caught.value.codes == [EXIT_STOP] * 2 and str(caught.value).count("enough") >= 2


def one_fails(process):
    def work():
        if process.rank == 1:
            raise DataError("no shard here")

    process.run_everywhere(work)


def test_an_error_of_any_rank_ends_all():
    with pytest.raises(RankFailed, match="no shard here") as caught:
        on_ranks(one_fails, 2)
    assert caught.value.codes == [EXIT_RETRY, EXIT_DATA] and "rank 1 ended with an error" in str(caught.value)


def meet(rank, port):
    import os

    from exlm_dist.config.schema import LaunchConfig
    from exlm_dist.parallel import process as processes

    os.environ["MASTER_PORT"] = str(port)
    processes.start(LaunchConfig(timeout=5, device="cpu"))


@pytest.mark.parametrize(
    "environment, code, words", [({}, EXIT_USAGE, "Set MASTER_PORT"), ({CHOSEN_PORT: "1"}, EXIT_RETRY, "next attempt")]
)
def test_a_port_in_use(environment, code, words):
    """If the launcher has chosen it, the next attempt uses another one."""
    import socket

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        with pytest.raises(RankFailed) as caught:
            run_processes(meet, 2, taken.getsockname()[1], environment=environment)
    assert caught.value.codes[0] == code and "is in use" in str(caught.value) and words in str(caught.value)


def lonely(rank):
    import os

    from exlm_dist.config.schema import LaunchConfig
    from exlm_dist.parallel import process as processes

    os.environ["WORLD_SIZE"] = "2"
    processes.start(LaunchConfig(timeout=5, device="cpu"))


def test_a_rank_that_never_comes():
    with pytest.raises(RankFailed, match="launch.timeout") as caught:
        run_processes(lonely, 1)
    assert caught.value.codes == [EXIT_RETRY]


def timeout_of_new_group(process):
    import torch.distributed as dist

    group = dist.new_group()
    return group._get_backend(__import__("torch").device("cpu")).options._timeout.total_seconds()


def test_groups_made_later_have_the_timeout_too():
    assert on_ranks(timeout_of_new_group, 2, timeout=33.0) == [33.0] * 2


def arrays(process):
    return np.arange(process.world) + process.rank


def test_results_come_back_in_the_order_of_the_ranks():
    assert [result.tolist() for result in on_ranks(arrays, 2)] == [[0, 1], [1, 2]]
