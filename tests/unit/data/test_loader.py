"""The loader: the same global batches for every layout and after every resume, and errors that say what to do."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_data import FakeDataset, varied_lengths
from hypothesis import given, settings
from hypothesis import strategies as st
from made_run import make_config
from packed import check_batch
from prepared_folder import overwrite, record_offset, write_folder

from exlm_dist.data.batch import PackedBatch
from exlm_dist.data.loader import Loader, eval_batches
from exlm_dist.data.mask_groups import Grouping
from exlm_dist.data.order import Order
from exlm_dist.data.recipe import Recipe
from exlm_dist.data.shards import ShardDataset
from exlm_dist.tokenizers.tokenizer import BOS, EOS, MASK
from exlm_dist.utils.errors import ConfigError, DataError

DATA = FakeDataset(varied_lengths(101))
RECIPE = Recipe(
    states=3, anchors=True, ratio=0.2, keep=0.0, random=0.0, vocab_size=512, max_positions=256, bucket=1, micro=2
)
EVALUATION = replace(RECIPE, ratio=0.15, micro=8)
DEFAULTS = {"global_batch": 16, "rank": 0, "world": 1, "prefetch": 0}


def loader(dataset: FakeDataset = DATA, seed: int = 5, block: int = 0, window: int = 1, **changes: object) -> Loader:
    recipe = {name: value for name, value in changes.items() if name not in DEFAULTS}
    others = {name: value for name, value in changes.items() if name in DEFAULTS}
    order = Order(seed, len(dataset), block, window)
    return Loader(dataset, replace(RECIPE, **recipe), order=order, **{**DEFAULTS, **others})


def same(a: PackedBatch, b: PackedBatch) -> bool:
    return all(np.array_equal(value, getattr(b, name)) for name, value in vars(a).items())


def is_filler(batch: PackedBatch) -> bool:
    return bool((batch.sample_ids < 0).all())


def gathered(step: int, world: int, **changes: object) -> list[PackedBatch]:
    """Micro-batches of all ranks, in the order of their index in the global batch."""
    parts = [loader(rank=rank, world=world, **changes).step(step) for rank in range(world)]
    batches = [batch for part in parts for batch in part.micro_batches]
    return sorted(batches, key=lambda batch: batch.index)


@pytest.mark.parametrize("step", [0, 6, 1000])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_micro_batches_do_not_depend_on_the_number_of_ranks(world: int, step: int) -> None:
    alone, spread = gathered(step, 1), gathered(step, world)
    assert len(alone) == len(spread) == 8
    assert all(same(a, b) for a, b in zip(alone, spread))
    assert [batch.index for batch in spread] == list(range(8))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_other_micro_batch_sizes_have_the_same_samples(world: int) -> None:
    def samples(**changes: int) -> list[int]:
        return sorted(np.concatenate([batch.sample_ids for batch in gathered(3, world, **changes)]).tolist())

    assert samples(micro=1) == samples(micro=2) == samples(micro=4)


@pytest.mark.parametrize("states,anchors", [(1, False), (4, True), (2, False)])
@pytest.mark.parametrize("bucket", [1, 32])
def test_batches_are_valid_and_sizes_are_known_everywhere(states: int, anchors: bool, bucket: int) -> None:
    settings = {"states": states, "anchors": anchors, "bucket": bucket}
    for step in (0, 5, 6, 7):  # 101 samples: step 6 crosses into the next epoch
        steps = [loader(rank=rank, world=4, **settings).step(step) for rank in range(4)]
        batches = [batch for part in steps for batch in part.micro_batches]
        for batch in batches:
            check_batch(batch)
            assert batch.step == step and batch.num_sequences == 2
        for part in steps:
            assert part.num_sequences == 16
            assert part.num_targets == sum(batch.num_targets for batch in batches)
            assert part.num_masked == sum(int(batch.is_masked.sum()) for batch in batches)
            assert part.num_original_tokens == sum(batch.num_original_tokens for batch in batches)
            assert part.num_tokens == sum(batch.num_tokens for batch in batches)
            padded = sum(len(batch.input_ids) for batch in part.micro_batches)
            assert part.padding_fraction == pytest.approx(1 - sum(b.num_tokens for b in part.micro_batches) / padded)


def test_content_is_that_of_the_samples() -> None:
    for batch in loader().step(2).micro_batches:
        for row, sample in enumerate(batch.sample_ids):
            tokens = slice(batch.cu_tokens[row], batch.cu_tokens[row + 1])
            targets = slice(batch.cu_targets[row], batch.cu_targets[row + 1])
            whole = np.concatenate([[BOS], DATA.payload(int(sample)), [EOS]])
            seen, positions = batch.input_ids[tokens], batch.position[tokens]
            ordinary = batch.clone[tokens] == 0
            assert np.array_equal(seen[ordinary], whole[positions[ordinary]])
            first = batch.clone[tokens] == 1
            assert np.array_equal(batch.target_ids[targets], whole[positions[first]])
            assert (seen[first][1:-1] == MASK).all()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 60),
    st.sampled_from([(8, 1), (8, 2), (12, 4), (24, 8)]),
    st.integers(0, 2**62),
    st.integers(0, 9),
    st.integers(1, 5),
)
def test_every_epoch_has_each_sample_once_over_resumes(
    num: int, sizes: tuple[int, int], seed: int, block: int, window: int
) -> None:
    batch, world = sizes
    shuffle = {"seed": seed, "block": block, "window": window}
    dataset = FakeDataset(varied_lengths(num, high=12))
    seen: dict[int, list[int]] = {}
    for step in range(-(-3 * num // batch)):
        for rank in reversed(range(world)):  # a new loader each time: nothing is remembered
            resumed = loader(dataset, rank=rank, world=world, global_batch=batch, micro=1, **shuffle)
            for micro in resumed.step(step).micro_batches:
                for epoch, sample in zip(micro.epochs.tolist(), micro.sample_ids.tolist()):
                    seen.setdefault(epoch, []).append(sample)
    for epoch in range(3):
        assert sorted(seen[epoch]) == list(range(num))


def test_epochs_and_seeds_change_order_and_masks() -> None:
    dataset = FakeDataset(varied_lengths(16))
    first, second = loader(dataset).step(0), loader(dataset).step(1)
    other = loader(dataset, seed=6).step(0)

    def inputs(part) -> list[bytes]:
        return [batch.input_ids.tobytes() for batch in part.micro_batches]

    assert inputs(first) != inputs(second) != inputs(other) != inputs(first)


def test_shards_with_a_damaged_record_keep_every_size(tmp_path: Path) -> None:
    rows = [DATA.payload(sample % len(DATA)) for sample in range(202)]  # each length occurs at least twice
    folder = write_folder(tmp_path / "data", rows, vocab_size=512)
    intact = [part.micro_batches for part in map(loader(ShardDataset.open(folder, "train")).step, range(13))]
    dataset = ShardDataset.open(folder, "train", max_bad_records=0.01)
    path, offset = record_offset(dataset, 77)
    overwrite(path, offset, b"\xff")
    damaged = [part.micro_batches for part in map(loader(dataset).step, range(13))]
    differing = 0
    for before, after in zip(sum(intact, []), sum(damaged, [])):
        check_batch(after)
        assert np.array_equal(before.sample_ids, after.sample_ids)
        assert np.array_equal(before.cu_tokens, after.cu_tokens) and np.array_equal(before.position, after.position)
        differing += not (same(before, after))
    assert [record.sample for record in dataset.bad_records] == [77] and differing <= 2


@pytest.mark.parametrize("prefetch", [1, 3])
def test_prefetched_steps_in_any_order_are_the_same(prefetch: int) -> None:
    direct, ahead = loader(), loader(prefetch=prefetch)
    try:
        for step in (0, 1, 2, 9, 10, 3, 3, 4, 2, 11):
            part = ahead.step(step)
            assert part.step == step and part.wait_seconds >= 0
            assert all(same(a, b) for a, b in zip(part.micro_batches, direct.step(step).micro_batches))
    finally:
        ahead.close()


def wait_until(condition, limit: float = 10.0) -> None:
    """Until `condition()` holds; fails after `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "gave up waiting"
        time.sleep(0.005)


def test_prefetch_works_ahead_in_a_thread_and_is_bounded() -> None:
    dataset = FakeDataset(varied_lengths(50))
    ahead = loader(dataset, prefetch=2)
    try:
        ahead.step(0)
        wait_until(lambda: dataset.reads == 3)
        time.sleep(0.05)
        assert dataset.reads == 3 and dataset.threads == {"exlm-data"}
        ahead.step(1)
        wait_until(lambda: dataset.reads == 4)
    finally:
        ahead.close()


def test_failure_in_the_thread_reaches_the_consumer_of_its_step_only() -> None:
    class Damaged(FakeDataset):
        def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            if self.reads == 2:
                self.reads += 1
                raise DataError("shard-000007.tar: damaged at byte 1234")
            return super().read(ids)

    ahead = loader(Damaged(varied_lengths(50)), prefetch=2)
    try:
        ahead.step(0)
        ahead.step(1)
        with pytest.raises(DataError, match="shard-000007.tar: damaged at byte 1234"):
            ahead.step(2)
        assert ahead.step(3).step == 3
        assert ahead.step(2).step == 2, "asked again, read again"
    finally:
        ahead.close()


def test_close_ends_the_thread_and_later_use_is_refused() -> None:
    ahead = loader(prefetch=2)
    ahead.step(0)
    ahead.close()
    assert "exlm-data" not in {thread.name for thread in threading.enumerate() if thread.is_alive()}
    with pytest.raises(RuntimeError, match="closed"):
        ahead.step(1)
    ahead.close()


def test_close_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    from exlm_dist.data.prefetch import Prefetcher

    release = threading.Event()
    stuck = Prefetcher(lambda step: release.wait(30) if step else step, 1, limit=0.05)
    try:
        assert stuck.get(0) == 0
        with pytest.raises(TimeoutError, match="global batch 1 "):
            stuck.get(1)
        stuck.close(limit=0.05)
        assert "still reading" in caplog.text
    finally:
        release.set()


@pytest.mark.parametrize(
    ("batch", "micro", "world", "words"),
    [
        (
            100,
            8,
            4,
            ["batch.sequences 100", "4 data-parallel ranks x batch.micro 8 = 32", "96 or 128", "or batch.micro 5"],
        ),
        (10, 4, 1, ["batch.sequences 10", "1 data-parallel ranks x batch.micro 4 = 4", "8 or 12", "or batch.micro 5"]),
        (3, 4, 2, ["batch.sequences 3", "2 data-parallel ranks x batch.micro 4 = 8", "fit: batch.sequences 8 (in a"]),
    ],
)
def test_batch_that_does_not_divide(batch: int, micro: int, world: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        loader(global_batch=batch, micro=micro, world=world)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_expanded_length_over_the_limit() -> None:
    with pytest.raises(
        ConfigError, match=r"62 tokens expand to up to 90 .* model.max_positions 80. Set model.max_positions to 90"
    ):
        loader(FakeDataset(np.array([5, 60])), max_positions=80)
    loader(FakeDataset(np.array([5, 60])), max_positions=90)


def test_empty_sequences_and_foreign_tokens() -> None:
    with pytest.raises(DataError, match="empty"):
        loader(FakeDataset(np.array([5, 0, 3])))
    with pytest.raises(DataError, match=r"token id \d+ in sample \d+, but the vocabulary has 64"):
        loader(vocab_size=64).step(0)


def test_more_kept_and_random_than_all() -> None:
    with pytest.raises(ConfigError, match="masking.keep 0.7 . masking.random 0.6 is more than 1"):
        loader(keep=0.7, random=0.6)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_is_the_same_for_every_world(world: int) -> None:
    alone = list(eval_batches(DATA, EVALUATION, sequences=50, rank=0, world=1))
    ranks = [list(eval_batches(DATA, EVALUATION, sequences=50, rank=rank, world=world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1, "every rank takes part as often"
    counted = sorted((b for batches in ranks for b in batches if not is_filler(b)), key=lambda batch: batch.index)
    assert len(counted) == len(alone) == 7 and all(same(a, b) for a, b in zip(alone, counted))
    assert sorted(np.concatenate([batch.sample_ids for batch in counted]).tolist()) == list(range(50))
    for batches in ranks:
        for batch in batches:
            check_batch(batch)
            assert not (is_filler(batch) and batch.is_masked.any())


def test_evaluation_masks_the_same_positions_for_every_model() -> None:
    def masked(**changes: object) -> dict[int, list[tuple[int, int]]]:
        found = {}
        for batch in eval_batches(DATA, replace(EVALUATION, **changes), sequences=50, rank=0, world=1):
            first = batch.state_index[: batch.num_states : batch.states]
            for row, sample in enumerate(batch.sample_ids.tolist()):
                own = slice(batch.cu_targets[row], batch.cu_targets[row + 1])
                chosen = batch.is_masked[own]
                assert (batch.input_ids[first[own]][chosen] == MASK).all()
                positions, targets = batch.position[first[own]][chosen], batch.target_ids[own][chosen]
                found[sample] = list(zip(positions.tolist(), targets.tolist()))
        return found

    assert masked() == masked(states=1, anchors=False, micro=16)


def test_evaluation_uses_what_a_small_split_has() -> None:
    batches = list(eval_batches(FakeDataset(np.array([4, 9, 6])), EVALUATION, sequences=50, rank=0, world=1))
    assert [batch.num_sequences for batch in batches] == [3]


def test_the_ratio_of_a_step_is_that_of_the_schedule() -> None:
    falling = {"ratio": 0.4, "schedule": ((10, 0.4), (10, 0.2), (30, 0.1))}
    assert all(same(a, b) for a, b in zip(gathered(3, 1, **falling), gathered(3, 2, ratio=0.4)))
    assert all(same(a, b) for a, b in zip(gathered(20, 1, **falling), gathered(20, 2, ratio=0.2 + (0.1 - 0.2) * 0.5)))
    assert all(same(a, b) for a, b in zip(gathered(99, 1, **falling), gathered(99, 2, ratio=0.1)))
    with pytest.raises(ConfigError, match=r"with a masking ratio of 0.5"):
        loader(ratio=0.1, spread=0.1, schedule=((10, 0.4),), max_positions=100)


def test_windows_have_the_blocks_that_they_read_ahead() -> None:
    dataset = FakeDataset(varied_lengths(96, high=9))
    steps = [loader(dataset, block=4, window=4).step(step) for step in range(12)]
    ahead = dataset.preloaded
    assert [len(ahead), len(set(ahead[:20])), sorted(ahead)[0]] == [48, 20, 0]
    later = {sample // 4 for part in steps[1:2] for batch in part.micro_batches for sample in batch.sample_ids.tolist()}
    assert later == set(ahead[:4])


def test_recipes_are_those_of_the_configuration(tmp_path: Path) -> None:
    masking = {"ratio": 0.4, "eval_ratio": 0.2, "keep": 0.1, "random": 0.1, "spread": 0.1, "span_p": 0.2}
    config = make_config(tmp_path, "x", tmp_path, masking={**masking, "schedule": [[9, 0.3]]})
    training = Recipe.of(config, 77)
    assert (training.ratio, training.keep, training.random, training.vocab_size) == (0.4, 0.1, 0.1, 77)
    assert (training.spread, training.schedule, training.grouping) == (0.1, ((9, 0.3),), Grouping("token", 0.2, 10))
    fixed = {"spread": 0.0, "schedule": (), "grouping": None}
    assert Recipe.for_evaluation(config, 77) == replace(training, ratio=0.2, keep=0.0, random=0.0, **fixed)
