"""Ranks agree in log2(n) rounds, whatever their number; one that is gone is noticed."""

from __future__ import annotations

import os
import signal

import pytest
from parallel.harness import RankFailed, _joined, on_ranks, run_processes

from exlm_dist.config.schema import ParallelConfig
from exlm_dist.parallel.agreement import rounds
from exlm_dist.parallel.process import takes_one_connection
from exlm_dist.utils.errors import EXIT_RETRY


@pytest.mark.parametrize("world", [*range(1, 34), 255, 256, 257, 1000])
def test_every_rank_hears_of_every_other_in_few_rounds(world):
    """Simulated ranks: bit r of what a rank has heard is the flag of rank r."""
    heard = [1 << rank for rank in range(world)]
    for distance in rounds(world):
        heard = [heard[rank] | heard[(rank - distance) % world] for rank in range(world)]
    assert heard == [(1 << world) - 1] * world
    assert 2 ** len(rounds(world)) < 2 * world or world == 1


def agree(process):
    """For each rank in turn: it alone has the flag; then nobody; and what that sends."""
    from exlm_dist.parallel.traffic import Traffic

    found = [process.any(process.rank == who) for who in range(process.world)]
    with Traffic() as traffic:
        nobody = process.any(False)
    return found, nobody, dict(traffic.calls)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_any(world):
    sends = {"send": len(rounds(world))} if world > 1 else {}
    assert on_ranks(agree, world) == [([True] * world, False, sends)] * world


def loses_one(process):
    from exlm_dist.parallel.process import PeerLost, lost_peer

    if process.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        process.any(False)
    except RuntimeError as error:
        assert lost_peer(error), error
        raise PeerLost("noticed") from error


def waits_for_one(process):
    import time

    from exlm_dist.parallel.process import PeerLost, lost_peer

    if process.rank == 1:
        time.sleep(30)
    try:
        process.any(False)
    except RuntimeError as error:
        assert lost_peer(error), error
        raise PeerLost("noticed") from error


def test_a_rank_that_is_killed_is_noticed():
    with pytest.raises(RankFailed, match="noticed") as failure:
        on_ranks(loses_one, 2)
    assert failure.value.codes[0] == EXIT_RETRY


def test_a_rank_that_does_not_answer_is_noticed_after_the_timeout():
    """`launch.timeout`, here 5 s."""
    with pytest.raises(RankFailed, match="noticed") as failure:
        run_processes(_joined, 2, waits_for_one, 5.0, timeout=40.0)
    assert failure.value.codes[0] == EXIT_RETRY


@pytest.mark.parametrize(
    "parallel, wanted",
    [({}, False), ({"tensor": 2}, True), ({"tensor": 2, "sequence": True}, True), ({"tensor": 2, "zero": 3}, False)],
    ids=str,
)
def test_kernels_start_in_order_where_megatron_relies_on_it(parallel, wanted):
    assert takes_one_connection(ParallelConfig.model_validate(parallel)) == wanted
