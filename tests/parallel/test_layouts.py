"""Rank arithmetic, the groups it gives, and the layouts that are refused."""

from __future__ import annotations

import itertools

import pytest
from parallel.harness import on_ranks

from exlm_dist.config import check_vocabulary, check_world
from exlm_dist.config.check import check_config
from exlm_dist.config.schema import ParallelConfig, RunConfig
from exlm_dist.parallel.layout import AXES, Coordinates, Layout
from exlm_dist.utils.errors import ConfigError

LAYOUTS = [Layout(*degrees) for degrees in itertools.product((1, 2, 3), repeat=3)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_coordinates_and_ranks_are_inverse_and_ordered(layout):
    every = [layout.coordinates(rank) for rank in range(layout.world)]
    assert [layout.rank(at) for at in every] == list(range(layout.world))
    assert every == sorted(every, key=lambda at: (at.pipeline, at.data, at.tensor))
    with pytest.raises(ValueError, match="is not below"):
        layout.coordinates(layout.world)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_groups_are_the_ranks_that_differ_along_the_axes(layout, count):
    for along in itertools.combinations(AXES, count):
        groups = layout.groups(*along)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
        fixed = [axis for axis in AXES if axis not in along]
        for group in groups:
            assert group == sorted(group) and layout.group_of(group[-1], *along) == group
            assert len({tuple(getattr(layout.coordinates(rank), axis) for axis in fixed) for rank in group}) == 1


def test_the_order_is_that_of_deepspeed_and_megatron():
    """Eight ranks of 2 x 2 x 2, written out: tensor neighbours, pipeline stages four apart."""
    layout = Layout(2, 2, 2)
    assert layout.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("pipeline") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert layout.groups("pipeline", "tensor") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert layout.coordinates(6) == Coordinates(pipeline=1, data=1, tensor=0)
    every = [layout.coordinates(rank) for rank in range(8)]
    assert on_ranks(deepspeed_coordinates, 1) == [[(at.pipeline, at.data, at.tensor) for at in every]]


def deepspeed_coordinates(process):
    """(pipeline, data, tensor) of each of eight ranks according to DeepSpeed."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    theirs = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=2)
    return [(at.pipe, at.data, at.model) for at in map(theirs.get_coord, range(8))]


def sums(process, degrees):
    """Sum of the ranks over each group of this rank, and the timeouts of the groups."""
    import torch
    import torch.distributed as dist

    from exlm_dist.parallel.process_groups import Grid

    grid = Grid.make(Layout(*degrees), process.rank)
    found, timeouts = {}, set()
    for name in ("tensor", "pipeline", "data", "model"):
        group = getattr(grid, name)
        value = torch.tensor(process.rank)
        dist.all_reduce(value, group=group.group)
        timeouts.add(group.group._get_backend(value.device).options._timeout.total_seconds())
        found[name] = (group.rank, group.size, int(value))
    return found, grid.reports_metrics, timeouts


@pytest.mark.parametrize("degrees", [(2, 2, 1), (1, 2, 2), (4, 1, 1)])
def test_groups_reach_the_ranks_they_should(degrees):
    layout = Layout(*degrees)
    axes = {"tensor": ["tensor"], "pipeline": ["pipeline"], "data": ["data"], "model": ["pipeline", "tensor"]}
    for rank, (found, reports, timeouts) in enumerate(on_ranks(sums, 4, degrees, timeout=40.0)):
        for name, along in axes.items():
            group = layout.group_of(rank, *along)
            assert found[name] == (group.index(rank), len(group), sum(group))
        at = layout.coordinates(rank)
        assert reports == (at.pipeline == layout.pipeline - 1 and at.tensor == 0)
        assert timeouts == {40.0}


def config_of(tmp_path, **sections) -> RunConfig:
    model = {"layers": 4, "width": 48, "heads": 6, "ffn": 96, **sections.pop("model", {})}
    return RunConfig.model_validate(
        {"name": "x", "data": {"path": str(tmp_path)}, "schedule": {"steps": 10}, "model": model, **sections}
    )


@pytest.mark.parametrize(
    "sections, words",
    [
        (
            {"parallel": {"tensor": 4}},
            ["model.heads 6 is not a multiple of parallel.tensor 4", "parallel.tensor 3 or 6", "model.heads 4 or 8"],
        ),
        (
            {"parallel": {"tensor": 2}, "model": {"ffn": 95}},
            ["model.ffn 95", "parallel.tensor 2", "parallel.tensor 1 or 5", "model.ffn 94 or 96"],
        ),
        (
            {"parallel": {"pipeline": 5}},
            ["parallel.pipeline 5 stages", "model.layers is 4", "parallel.pipeline 4; or model.layers 5"],
        ),
        ({"parallel": {"pipeline": 2, "zero": 2}}, ["parallel.zero 2", "parallel.pipeline 2", "parallel.zero 1"]),
        ({"parallel": {"pipeline": 2, "zero": 0}}, ["parallel.zero 0", "parallel.pipeline 2", "parallel.zero 1"]),
        ({"parallel": {"sequence": True}}, ["parallel.sequence true", "parallel.tensor is 1"]),
    ],
)
def test_settings_that_cannot_work(tmp_path, sections, words):
    with pytest.raises(ConfigError) as refused:
        check_config(config_of(tmp_path, **sections))
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    "parallel, world, words",
    [
        (
            {"tensor": 2, "pipeline": 2},
            6,
            ["6 ranks are not a multiple of", "= 4", "4 or 8 ranks", "parallel.tensor 1 or 3", "pipeline 1 or 3"],
        ),
        ({"tensor": 2, "data": 3}, 8, ["= 6 ranks, but there are 8", "Start 6", "parallel.data 4"]),
        ({"tensor": 3, "data": 2}, 8, ["= 6 ranks, but there are 8", "Start 6."]),
        ({"tensor": 2}, 10, ["256 is not a multiple of 5 data-parallel ranks x batch.micro 32 = 160", "160 or 320"]),
    ],
)
def test_worlds_that_cannot_work(tmp_path, parallel, world, words):
    with pytest.raises(ConfigError) as refused:
        check_world(config_of(tmp_path, parallel=parallel), world)
    assert all(word in str(refused.value) for word in words), refused.value


def test_vocabularies_that_cannot_work():
    check_vocabulary(9, 3)
    check_vocabulary(10, 4)
    with pytest.raises(ConfigError, match="vocabulary of 9 entries .* parallel.tensor 4 .* parallel.tensor 3"):
        check_vocabulary(9, 4)


def test_layouts_that_work(tmp_path):
    check_config(config_of(tmp_path, parallel={"tensor": 3, "pipeline": 4, "sequence": True}))
    assert Layout.of(ParallelConfig(tensor=2), 8) == Layout(2, 1, 4)
    assert Layout.of(ParallelConfig(tensor=2, pipeline=2, data=2), 8).world == 8


@pytest.mark.parametrize(
    "parallel, processes, expected",
    [({}, "auto", 1), ({"tensor": 2, "pipeline": 2}, 2, 4), ({"tensor": 2}, 4, 4), ({"data": 3}, "auto", 3)],
)
def test_local_processes(tmp_path, parallel, processes, expected):
    assert config_of(tmp_path, parallel=parallel, launch={"processes": processes}).local_processes == expected
