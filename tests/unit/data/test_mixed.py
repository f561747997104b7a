"""Several folders as one data set, and the loader over it: what it reads is what a simulation of the stream says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_run import make_config, make_data, with_sources
from packed import check_batch
from prepared_folder import overwrite, random_sequences, record_offset, write_folder

from exlm_dist.config import RunConfig
from exlm_dist.data.loader import Loader
from exlm_dist.data.mixed import MixedDataset
from exlm_dist.data.mixed_order import training_order
from exlm_dist.data.opening import open_held_out, open_training_data, sole_folder
from exlm_dist.data.order import Order
from exlm_dist.data.recipe import Recipe
from exlm_dist.data.shards import ShardDataset
from exlm_dist.utils.errors import ConfigError, DataError

ROWS = {"a": random_sequences(90, seed=1), "b": random_sequences(25, seed=2), "c": random_sequences(40, seed=3)}
PHASES = [
    {"steps": 4, "sources": {"a": 3, "b": 1}},
    {"sources": {"c": {"epochs": 0.5}, "b": 1}, "masking": {"ratio": 0.3}},
]
WINDOWS = {"shuffle": "windows", "block": 4, "window": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("sources")
    return {name: str(write_folder(root / name, rows)) for name, rows in ROWS.items()}


def config_of(folders: dict[str, str], **data) -> RunConfig:
    base = make_config(Path("runs"), "run", Path(), schedule={"steps": 12}, batch={"sequences": 8, "micro": 2})
    return with_sources(base, {name: {"path": path} for name, path in folders.items()}, PHASES, **data)


def loader_of(config: RunConfig, data: MixedDataset, rank: int = 0, world: int = 1) -> Loader:
    return Loader(
        data,
        Recipe.of(config, 300),
        order=training_order(config, data),
        global_batch=8,
        rank=rank,
        world=world,
        prefetch=0,
    )


def test_samples_of_one_source_follow_those_of_another(folders):
    data = open_training_data(config_of(folders).data)
    rows = [row for name in folders for row in ROWS[name]]
    ids = np.random.default_rng(0).permutation(len(rows))[:70]
    tokens, lengths = data.read(ids)
    assert np.array_equal(tokens, np.concatenate([rows[i] for i in ids])) and tokens.dtype == np.int32
    assert lengths.tolist() == [len(rows[i]) for i in ids] == data.lengths[ids].tolist()
    sizes = [len(row) for row in rows]
    assert len(data) == len(data.lengths) == len(rows) and data.lengths[:100].tolist() == sizes[:100]
    assert (data.lengths.min(), data.lengths.max()) == (min(sizes), max(sizes))
    assert data.lengths.mean() == pytest.approx(np.mean(sizes)) and ((data.lengths * 2)[ids] == 2 * lengths).all()
    assert [data.named(i) for i in (0, 89, 90, 154)] == ["a 0", "a 89", "b 0", "c 39"]
    assert data.read(np.array([], np.int64))[0].size == 0


@pytest.mark.parametrize("data_settings", [{}, WINDOWS])
def test_the_loader_gives_what_the_simulated_stream_says_on_any_ranks(folders, data_settings):
    """Each source goes through its own epochs in its own order, and is taken as often as the phases say."""
    config = config_of(folders, **data_settings)
    data = open_training_data(config.data)
    order = training_order(config, data)
    streams = {name: list(zip(*one.at(np.arange(300)))) for name, one in zip(folders, order.orders)}
    recipe = Recipe.of(config, 300)
    taken = dict.fromkeys(folders, 0)
    expected = {"a": 24, "b": 8 + 44, "c": 20}
    for t in range(12):
        whole = loader_of(config, data).step(t)
        parts = [loader_of(config, data, rank, 2).step(t).micro_batches for rank in range(2)]
        for one, other in zip(whole.micro_batches, [batch for part in parts for batch in part]):
            check_batch(one)
            assert all(np.array_equal(mine, vars(other)[name]) for name, mine in vars(one).items())
        ids = np.concatenate([batch.sample_ids for batch in whole.micro_batches])
        epochs = np.concatenate([batch.epochs for batch in whole.micro_batches])
        tokens = []
        for first, end, name in zip(data.starts, data.starts[1:], folders):
            here = (ids >= first) & (ids < end)
            seen = sorted(zip(epochs[here].tolist(), (ids[here] - first).tolist()))
            assert seen == sorted(streams[name][taken[name] : taken[name] + len(seen)])
            taken[name] += len(seen)
            tokens.append(sum(len(ROWS[name][sample]) + 2 for _, sample in seen))
        assert whole.source_tokens == tuple(tokens) and sum(tokens) == whole.num_original_tokens
        assert recipe.at(t).ratio == (0.15 if t < 4 else 0.3)
    assert taken == expected


def test_blocks_are_read_ahead_in_their_source(folders, monkeypatch):
    config = config_of(folders, **WINDOWS)
    data = open_training_data(config.data)
    loader = loader_of(config, data)
    for t in range(3):
        loader.step(t)
    ahead = {name: len(source._pieces) for name, source in data.sources.items()}
    assert ahead["a"] > 3 and ahead["b"] and not ahead["c"]
    read = []
    monkeypatch.setattr(ShardDataset, "_fetch", lambda *args: read.append(args) or pytest.fail("not read ahead"))
    source = data.sources["a"]
    block = next(iter(source._pieces))[1]
    data.preload([block])  # is there already
    assert not read


def test_one_source_is_read_as_by_its_path_alone(folders):
    config = make_config(Path("runs"), "run", Path(folders["a"]))
    named = with_sources(config, {"a": {"path": folders["a"], "weight": 2}})
    alone, one = open_training_data(config.data), open_training_data(named.data)
    assert isinstance(one, MixedDataset) and one.fingerprint == alone.fingerprint
    order = training_order(config, alone)
    assert isinstance(order, Order)
    for mine, theirs in zip(order.at(np.arange(300)), training_order(named, one).at(np.arange(300))):
        assert np.array_equal(mine, theirs)


def test_fingerprint_depends_on_content_and_order_of_the_sources(folders):
    forth, back = (
        open_training_data(config_of(dict(names)).data).fingerprint
        for names in (folders.items(), reversed(folders.items()))
    )
    renamed = open_training_data(config_of({name.upper(): path for name, path in folders.items()}).data)
    assert forth != back and renamed.fingerprint == forth


def test_damage_is_replaced_within_its_source(folders, tmp_path):
    damaged = write_folder(tmp_path / "b", ROWS["b"])
    path, offset = record_offset(ShardDataset.open(damaged, "train"), 5)
    overwrite(path, offset, b"\xff\xff")
    data = open_training_data(config_of({**folders, "b": str(damaged)}, max_bad_records=0.1).data)
    tokens, lengths = data.read(np.array([90 + 5]))
    (event,) = data.sources["b"].bad_records
    assert lengths[0] == len(ROWS["b"][5])
    assert np.array_equal(tokens, ROWS["b"][event.replacement][: lengths[0]])


def test_what_cannot_be_mixed_is_named(tmp_path):
    one, other = make_data(tmp_path / "one"), make_data(tmp_path / "other", extra_token="[K+]")
    config = config_of({"drugs": str(one), "salts": str(other), "c": str(one)})
    with pytest.raises(DataError, match="drugs .*one.* and salts .*other.* their tokenizers differ") as caught:
        open_training_data(config.data)
    assert f"--tokenizer {one}" in str(caught.value)
    with pytest.raises(ConfigError, match=f"run was trained on several sources .drugs: {one}, salts: .*--data"):
        sole_folder(config)
    assert list(open_held_out(config.data)) == ["drugs", "salts", "c"]
    single = make_config(Path("runs"), "run", one)
    assert sole_folder(single) == one and list(open_held_out(single.data)) == [""]
