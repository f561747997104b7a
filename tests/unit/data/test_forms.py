"""Molecules in several forms, one form after another: an epoch has each molecule once, in the epoch's form."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_run import make_config, with_sources
from prepared_folder import random_sequences, write_folder

from exlm_dist.data.blocks import Blocks
from exlm_dist.data.loader import Loader
from exlm_dist.data.manifest import MANIFEST, sealed
from exlm_dist.data.mixed_order import training_order
from exlm_dist.data.opening import open_training_data
from exlm_dist.data.order import Order
from exlm_dist.data.recipe import Recipe
from exlm_dist.doctor.preflight import check_run
from exlm_dist.training.sources import Sources
from exlm_dist.utils.errors import ConfigError

MOLECULES, FORMS = 130, 3
ROWS = random_sequences(MOLECULES * FORMS, seed=4)
WINDOWS = {"shuffle": "windows", "block": 20, "window": 3}


def with_forms(folder: Path, rows: list[np.ndarray], forms: int) -> str:
    """A prepared folder whose training split has the rows as so many forms."""
    write_folder(folder, rows, shard_bytes=1 << 13)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["splits"]["train"]["forms"] = forms
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("forms")
    plain = str(write_folder(root / "plain", random_sequences(70, seed=5)))
    return {"plain": plain, "random": with_forms(root / "random", ROWS, FORMS)}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(0, 99), st.integers(0, 30), st.integers(1, 5), st.integers(1, 5))
def test_epochs_go_through_the_forms(num: int, seed: int, block: int, window: int, forms: int) -> None:
    order, alone = Order(seed, num, block, window, forms), Order(seed, num, block, window)
    positions = np.arange(2 * forms * num)
    epochs, samples = order.at(positions)
    own_epochs, own = alone.at(positions)
    assert np.array_equal(epochs, own_epochs) and np.array_equal(samples, own + epochs % forms * num)
    assert sorted(samples[: forms * num].tolist()) == list(range(forms * num)), "each form once, then again"
    assert order.starts.tolist() == [0, forms * num]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(1, 200), st.integers(1, 4))
def test_blocks_end_where_a_form_does(size: int, num: int, forms: int) -> None:
    blocks = Blocks(size, num, forms)
    ids = np.arange(num * forms)
    bounds = [blocks.bounds(block) for block in range(len(blocks))]
    assert [id for first, stop in bounds for id in range(first, stop)] == ids.tolist()
    assert max(stop - first for first, stop in bounds) <= size
    assert all(first // num == (stop - 1) // num for first, stop in bounds)
    assert all(bounds[block][0] <= id < bounds[block][1] for id, block in enumerate(blocks.of(ids).tolist()))
    assert np.array_equal(Blocks(size, num).of(ids[:num]), ids[:num] // size)


@pytest.mark.parametrize("names", [["random"], ["plain", "random"]])
def test_in_windows_the_blocks_of_the_next_form_are_read_ahead(
    names: list[str], folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over four epochs; of two sources too, of which the second has the forms."""
    config = make_config(Path("runs"), "run", Path(), batch={"sequences": 10, "micro": 5})
    config = with_sources(config, {name: {"path": folders[name], "weight": 1} for name in names}, **WINDOWS)
    data = open_training_data(config.data)
    order = training_order(config, data)
    by_sample = open_training_data(config.data.model_copy(update={"shuffle": "full"}))
    reads: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *given: reads.append(given[1]) or pread(*given))
    demanded, epochs_seen = [], set()
    for first in range(0, 4 * MOLECULES * len(names), 10):
        positions = np.arange(first, first + 10)
        data.preload(order.upcoming(positions))
        epochs, ids = order.at(positions)
        before = len(reads)
        tokens, _ = data.read(ids)
        demanded.append(len(reads) - before)
        assert np.array_equal(tokens, by_sample.read(ids)[0])
        own = ids[ids >= data.starts[-2]] - data.starts[-2]
        of_random = epochs[ids >= data.starts[-2]]
        assert np.array_equal(own // MOLECULES, of_random % FORMS)
        epochs_seen |= set(of_random.tolist())
    assert epochs_seen == {0, 1, 2, 3}
    assert sum(demanded[20:]) == 0, "after the first windows everything was read ahead"


def test_epochs_of_a_mixture_are_of_molecules(folders: dict[str, str], tmp_path: Path) -> None:
    """Two epochs of the forms are two passes over the molecules, which all that counts epochs knows."""
    amounts = {"plain": {"weight": 1}, "random": {"epochs": 2}}
    sources = {name: {"path": path, **amounts[name]} for name, path in folders.items()}
    schedule = {"steps": 40}
    config = make_config(tmp_path, "run", Path(), schedule=schedule, batch={"sequences": 8, "micro": 2})
    config = with_sources(config, sources)
    check_run(config)
    data = open_training_data(config.data)
    assert data.sizes == [70, MOLECULES] and data.starts.tolist() == [0, 70, 70 + MOLECULES * FORMS]
    found = Sources.of(config, data).epochs(40)
    assert found == {"plain": (320 - 2 * MOLECULES) / 70, "random": 2.0}
    with pytest.raises(ConfigError, match="The run has 320 sequences.*3 x 130 of random"):
        check_run(with_sources(config, {**sources, "random": {"path": folders["random"], "epochs": 3}}))
    order = training_order(config, data)
    loader = Loader(data, Recipe.of(config, 300), order=order, global_batch=8, rank=0, world=1, prefetch=0)
    seen = np.concatenate([batch.sample_ids for step in range(40) for batch in loader.step(step).micro_batches])
    random = np.sort(seen[seen >= 70]) - 70
    assert np.array_equal(random, np.arange(2 * MOLECULES)), "canonical ones first, then the first random ones"


def test_sources_with_forms_are_announced(
    folders: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As repeated counts that a text comes again, not that a molecule does."""
    config = make_config(tmp_path, "run", Path(), schedule={"steps": 160}, batch={"sequences": 8, "micro": 2})
    config = with_sources(config, {"random": {"path": folders["random"], "weight": 1}})
    with caplog.at_level("INFO", logger="exlm_dist"):
        Sources.of(config, open_training_data(config.data)).announce()
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("source random: 390 sequences, 3 forms of each molecule, of which an epoch has one, ")
    assert "9.85 epochs by step 160" in said
