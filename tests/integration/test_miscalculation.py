"""Flipped bits in activations, weights and gradients: found, named, and undone; without a fault nothing changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_run import make_data
from parallel.harness import RankFailed, on_ranks, run_processes
from training_runs import _train, final_hashes, tiny

from exlm_dist.config import RunConfig
from exlm_dist.tracking import read_events
from exlm_dist.training.recheck import EXCLUDED, FOUND
from exlm_dist.utils.errors import EXIT_DONE, EXIT_RETRY

#: Before this step (0-based) the fault happens; with checks every 2 steps it is checked, the one before it is not.
STEP, EVERY = 5, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "prepared")


def run_of(runs: Path, data: Path, world: int, recheck: int, **sections) -> RunConfig:
    sizes = {"sequences": 4 * world, "micro": 2}
    plain = {"schedule": {"steps": 8, "warmup": 2}, "evaluation": {"every": 0, "sequences": 4}, "batch": sizes}
    return tiny(runs, "run", data, launch={"recheck": recheck}, **plain | sections)


@pytest.fixture(scope="module")
def unchecked(data, tmp_path_factory):
    """Final hashes of a run on two ranks without checks."""
    config = run_of(tmp_path_factory.mktemp("unchecked"), data, 2, 0)
    assert run_processes(_train, 2, config.model_dump(), None) == [EXIT_DONE] * 2
    return final_hashes(config)


def flipped(tensor) -> None:
    """Flip one bit of the first element that is not 0."""
    import torch

    flat = tensor.detach().view(-1).view(torch.int32)
    flat[int(flat.nonzero()[0])] ^= 1 << 12


def _faulty(rank: int, settings: dict, at: int, where: str) -> int:
    """`_train`, but on rank `at` a bit flips before step STEP: in the weights for good, else in the next pass only."""
    import torch

    from exlm_dist.training.session import Session

    plain = Session.train_step
    hooks: list = []

    def strike(session: Session) -> None:
        block = session.engine.deepspeed.module.model.layers[1]
        if where == "weights":
            flipped(block.ffn.up.weight)
        elif where == "activations":
            hooks.append(block.ffn.register_forward_hook(lambda module, given, result: once(result)))
        else:
            hooks.append(block.ffn.up.weight.register_hook(once))

    def once(tensor):
        hooks.pop().remove()
        changed = tensor.clone(memory_format=torch.contiguous_format)
        flipped(changed)
        return changed

    def train_step(session: Session) -> None:
        if rank == at and session.step == STEP:
            strike(session)
        plain(session)

    Session.train_step = train_step
    return _train(rank, settings, None)


def found_by(config: RunConfig, world: int, at: int, where: str) -> dict:
    """What the run folder says after a fault on rank `at`."""
    with pytest.raises(RankFailed) as caught:
        run_processes(_faulty, world, config.model_dump(), at, where)
    assert caught.value.codes == [EXIT_RETRY] * world, str(caught.value)
    (line,) = (Path(config.runs) / "run" / FOUND).read_text().splitlines()
    return {**json.loads(line), "message": str(caught.value)}


def values_of(config: RunConfig, name: str) -> dict:
    """{step, None for a tag: value} of what the event log says under `name`."""
    events = read_events(Path(config.runs) / "run" / "events.jsonl")
    return {event.get("step"): event["values"][name] for event in events if name in event.get("values", {})}


def test_checks_change_no_bit(data, unchecked, tmp_path):
    config = run_of(tmp_path, data, 2, 1)
    assert run_processes(_train, 2, config.model_dump(), None) == [EXIT_DONE] * 2
    assert final_hashes(config) == unchecked
    assert values_of(config, "recheck/failed") == dict.fromkeys(range(1, 9), 0)
    assert not (tmp_path / "run" / EXCLUDED).exists()


def test_a_bit_that_flips_once_in_an_activation_is_found_named_and_undone(data, unchecked, tmp_path):
    config = run_of(tmp_path, data, 2, EVERY)
    found = found_by(config, 2, 1, "activations")
    assert (found["step"], found["ranks"], found["certain"], found["again"]) == (STEP + 1, [1], True, False)
    assert (tmp_path / "run" / EXCLUDED).read_text().split() == found["hosts"]
    (tag,) = values_of(config, f"miscalculation_step_{STEP + 1}").values()
    assert "rank 1" in tag
    # The save of step 4 was still being written, or not: from there, or from the beginning, all steps are done again.
    begun = 4 if list((tmp_path / "run/checkpoints").glob("step-*")) else 0
    assert run_processes(_train, 2, config.model_dump(), None) == [EXIT_DONE] * 2
    assert final_hashes(config) == unchecked
    assert values_of(config, "recheck/failed") == {step: int(step > begun) for step in (2, 4, 6, 8)}


def test_a_bit_that_flips_once_in_a_gradient_is_found_and_named(data, tmp_path):
    found = found_by(run_of(tmp_path, data, 2, EVERY), 2, 0, "gradients")
    assert (found["ranks"], found["certain"], found["again"]) == ([0], True, False)


def test_of_two_replicas_that_disagree_for_good_either_may_be_at_fault(data, tmp_path):
    config = run_of(tmp_path, data, 2, EVERY)
    found = found_by(config, 2, 1, "weights")
    assert (found["ranks"], found["certain"], found["again"]) == ([0, 1], False, True)
    assert not (tmp_path / "run" / EXCLUDED).exists() and "Either may be at fault" in found["message"]


def test_of_three_replicas_two_outvote_the_third(data, tmp_path):
    found = found_by(run_of(tmp_path, data, 3, EVERY), 3, 0, "weights")
    assert (found["ranks"], found["certain"], found["again"]) == ([0], True, True)
    assert len((tmp_path / "run" / EXCLUDED).read_text().split()) == 1


def _both_ways(process, settings: dict) -> tuple[list, list]:
    """Loss and norm of three steps without and with a check, which finds the digest that is computed again."""
    from dataclasses import replace

    from exlm_dist.data.loader import Loader
    from exlm_dist.data.order import Order
    from exlm_dist.data.recipe import Recipe
    from exlm_dist.data.shards import ShardDataset
    from exlm_dist.parallel.process_groups import Grid, Layout
    from exlm_dist.training.engine import build_engine
    from exlm_dist.training.step import loss_denominator, optimizer_step

    config = RunConfig.model_validate(settings)
    process = replace(process, grid=Grid.make(Layout.of(config.parallel, process.world), process.rank))
    train, replicas = ShardDataset.open(config.data.path, "train"), process.grid.data
    recipe = Recipe.of(config, train.vocab_size)
    places = {"rank": replicas.rank, "world": replicas.size}
    loader = Loader(train, recipe, order=Order(0, len(train)), global_batch=8, **places, prefetch=0)
    found: tuple[list, list] = [], []
    for checked, rows in enumerate(found):
        engine = build_engine(config, process, train.vocab_size, 20.0)
        for step in range(3):
            batches, digests = loader.step(step), []

            def check(trained: int, engine=engine, batches=batches, digests=digests) -> None:
                again = engine.digest(batches.micro_batches[0], loss_denominator(batches, config), scored=False)
                digests += [trained, again]

            result = optimizer_step(engine, batches, config, scored=True, check=check if checked else None).result
            rows.append((float(result.loss), float(result.grad_norm)))
            assert len(set(digests)) == checked
        engine.close()
    return found


@pytest.mark.parametrize("parallel", [{"zero": 0}, {"zero": 2}, {"zero": 3}, {"tensor": 2}], ids=str)
def test_a_check_changes_no_bit_in_any_layout(data, tmp_path, parallel):
    config = tiny(tmp_path, "run", data, parallel=parallel)
    for plain, checked in on_ranks(_both_ways, 2, config.model_dump()):
        assert plain == checked
