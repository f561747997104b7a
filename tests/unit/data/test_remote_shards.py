"""Shards and folders behind addresses: the same data whatever the network does, a bounded cache, clear refusals."""

import functools
import http.server
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from foreign_shards import MOLECULES, smiles_tokenizer, text_members, write_tar
from prepared_folder import overwrite, random_sequences, record_offset, write_folder
from range_server import FAULTS, serving

from exlm_dist.cli import main
from exlm_dist.data import mirror, remote, shard_files
from exlm_dist.data.block_cache import BlockCache, cache_folder, cache_limit
from exlm_dist.data.manifest import read_manifest
from exlm_dist.data.opening import open_dataset
from exlm_dist.data.places import address_of, common_root, joined
from exlm_dist.data.remote import NotGiven, Patience, Remote, Unreachable
from exlm_dist.data.shard_patterns import expand_places
from exlm_dist.prepare.index_shards import index_shards
from exlm_dist.utils.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, small blocks, and no long pauses."""
    monkeypatch.setenv("EXLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_files, "BLOCK", 1 << 13)
    quick = functools.partial(Patience, seconds=1.0, pause=0.01, longest_pause=0.05)
    monkeypatch.setattr(remote, "Patience", quick)
    mirror._mirrored.cache_clear()
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    return write_folder(root / "data", random_sequences(1500), shard_bytes=1 << 14)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("foreign")
    smiles_tokenizer(root / "tokenizer")
    for shard in range(3):
        write_tar(root / f"m-{shard}.tar", text_members(MOLECULES[76 * shard : 76 * (shard + 1)]))
    index_shards([str(root / "m-{0..2}.tar")], root / "index", tokenizer=root / "tokenizer", workers=1)
    return root


def read_all(dataset, seed: int = 1) -> np.ndarray:
    order = np.random.default_rng(seed).permutation(len(dataset))
    return np.concatenate([dataset.read(part)[0] for part in np.array_split(order, 6)])


@pytest.mark.parametrize("blocks", [{}, {"block": 50, "kept_blocks": 12}], ids=["samples", "blocks"])
@pytest.mark.parametrize("kinds", [*((kind,) for kind in FAULTS if kind != "slow"), FAULTS])
def test_a_prepared_folder_behind_an_address_gives_the_same_under_faults(prepared, kinds, blocks):
    expected = read_all(open_dataset(prepared, "train"))
    with serving(prepared, faults=0.0) as server:
        dataset = open_dataset(f"{server.address}/", "train", max_bad_records=0.0, **blocks)
        server.faults, server.kinds = 0.5, kinds
        assert np.array_equal(read_all(dataset), expected)
        faults = sum(count for kind, count in server.given.items() if kind)
        assert faults > 3 and dataset.bad_records == []
        assert dataset.retries > 0
        asked = server.given.total()
        assert np.array_equal(read_all(open_dataset(server.address, "train", **blocks)), expected)
        assert server.given.total() <= asked + 2  # all comes from the cache


def test_foreign_shards_are_indexed_and_read_over_http_as_they_are_here(foreign, tmp_path):
    here = read_all(open_dataset(foreign / "index", "train"))
    with serving(foreign, faults=0.2, kinds=("503", "short", "wrong range", "closed")) as server:
        pattern = f"{server.address}/m-{{0..2}}.tar"
        summary = index_shards([pattern], tmp_path / "d", tokenizer=foreign / "tokenizer", workers=1)
        assert summary.manifest["fingerprint"] == read_manifest(foreign / "index")["fingerprint"]
        dataset = open_dataset(tmp_path / "d", "train")
        assert np.array_equal(read_all(dataset), here)
        assert dataset.place(0) == f"{server.address}/m-0.tar"
        assert main(["data", "verify", str(tmp_path / "d")]) == 0
        (foreign / "index" / "shards-at.txt").write_text(f"{server.address}\n")
        try:  # the folder of the index behind an address too
            assert np.array_equal(read_all(open_dataset(f"{server.address}/index", "train")), here)
            assert main(["data", "stats", f"{server.address}/index"]) == 0
        finally:
            (foreign / "index" / "shards-at.txt").write_text(f"{foreign}\n")


def test_damage_behind_an_address_is_named_and_replaced_as_it_is_here(prepared, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    path, offset = record_offset(open_dataset(copy, "train"), 700)
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ 4]))
    local = open_dataset(copy, "train", max_bad_records=0.01)
    expected = read_all(local)
    with serving(copy) as server:
        dataset = open_dataset(server.address, "train", max_bad_records=0.01)
        assert np.array_equal(read_all(dataset), expected)
        (event,), (before,) = dataset.bad_records, local.bad_records
        assert event.file == f"{server.address}/{path.relative_to(copy)}"
        assert (event.sample, event.offset, event.replacement, event.got) == (
            700, offset, before.replacement, before.got,
        )  # fmt: skip


def test_a_server_that_stays_away_ends_the_reading_soon_and_can_be_tried_again(prepared):
    with serving(prepared) as server:
        dataset = open_dataset(server.address, "train")
        server.faults, server.kinds = 1.0, ("503",)
        server.failed = type("Never", (set,), {"__contains__": lambda *_: False})()
        start = time.monotonic()
        with pytest.raises(Unreachable, match=r"shard-\d+\.tar: bytes .* in 6 attempts.*HTTP 503") as caught:
            dataset.read(np.arange(20))
        assert caught.value.exit_code == 76 and time.monotonic() - start < 60
        server.faults = 0.0
        assert len(dataset.read(np.arange(20))[0])


def test_what_asking_again_cannot_help_is_said_at_once(prepared, tmp_path):
    with serving(prepared) as server:
        with pytest.raises(NotGiven, match="HTTP 404"):
            open_dataset(f"{server.address}/nothing", "train")
        with pytest.raises(NotGiven, match="bytes, 99 when it was indexed"):
            Remote().read(f"{server.address}/manifest.json", 0, 4, 99)
        assert server.given.total() == 1
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(prepared))
    plain = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.func.log_message = lambda *_: None
    threading.Thread(target=plain.serve_forever, daemon=True).start()
    try:
        with pytest.raises(NotGiven, match="whole files only"):
            open_dataset(f"http://127.0.0.1:{plain.server_port}", "train")
    finally:
        plain.shutdown()
        plain.server_close()


def test_a_manifest_that_names_files_outside_its_folder_is_refused(prepared, tmp_path):
    text = (prepared / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace("train/shard-000000.idx.npy", "../../evil.npy"))
    with serving(tmp_path) as server, pytest.raises(DataError, match="only files within its folder"):
        open_dataset(server.address, "train")
    assert not list(tmp_path.rglob("evil.npy"))


def test_missing_packages_are_named_with_the_line_that_installs_them(monkeypatch):
    import sys

    registry = pytest.importorskip("fsspec.registry", reason="fsspec is an extra")
    for module, scheme in (("s3fs", "s3"), ("gcsfs", "gs")):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(registry._registry, scheme, raising=False)
    with pytest.raises(DataError, match=r"pip install fsspec s3fs .*'exlm_dist\[remote\]'"):
        Remote().size("s3://bucket/a.tar")
    with pytest.raises(DataError, match="pip install fsspec gcsfs"):
        Remote().size("gs://bucket/a.tar")


def test_the_cache_stays_below_its_limit_and_survives_what_kills_leave(tmp_path):
    cache = BlockCache(tmp_path, 100_000)
    left = tmp_path / "blocks" / "k" / ".left.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x")
    os.utime(left, (1, 1))
    for number in range(300):
        cache.put("k", number, bytes(1000))
        if number == 150:
            kept = cache.open("k", 150, 1000)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(sizes) <= 100_000 + 16_000 and not left.exists()
    assert kept is not None and os.pread(kept, 2000, 0) == bytes(1000)  # evicted, yet open
    os.close(kept)
    assert cache.open("k", 0, 1000) is None and cache.open("k", 299, 999) is None
    handle = cache.open("k", 299, 1000)
    assert handle is not None
    os.close(handle)


def test_a_cache_smaller_than_what_is_read_changes_nothing(prepared, monkeypatch):
    monkeypatch.setenv("EXLM_CACHE_GB", "0.00002")
    expected = read_all(open_dataset(prepared, "train"))
    with serving(prepared) as server:
        dataset = open_dataset(server.address, "train")
        assert np.array_equal(read_all(dataset), expected)
        dataset.close()


def test_cache_settings(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache" and cache_limit() == 20e9
    for wrong in ("0", "x", "-1", "nan"):
        monkeypatch.setenv("EXLM_CACHE_GB", wrong)
        with pytest.raises(ConfigError, match="EXLM_CACHE_GB"):
            cache_limit()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EXLM_CACHE", str(tmp_path / "file" / "x"))
    with pytest.raises(DataError, match="Set EXLM_CACHE"):
        cache_folder()


def test_places():
    assert address_of(Path("s3://bucket/a")) == "s3://bucket/a" and address_of("/a/b") is None
    assert address_of("HTTPS://h/a") == "https://h/a" and address_of("a:b") is None
    assert joined("s3://b/x", "y/z.tar") == "s3://b/x/y/z.tar" and joined("/r", "/a.tar") == "/a.tar"
    assert expand_places(["http://h/s-{00..02}.tar", "http://h/s-{01..01}.tar?v=1"]) == [
        "http://h/s-00.tar", "http://h/s-01.tar", "http://h/s-02.tar", "http://h/s-01.tar?v=1",
    ]  # fmt: skip
    with pytest.raises(DataError, match="write braces|Write braces"):
        expand_places(["http://h/*.tar"])
    assert common_root(["s3://b/x/1.tar", "s3://b/x/2.tar"]) == "s3://b/x"
    assert common_root(["s3://b/1.tar", "s3://c/1.tar"]) == "" and common_root(["/a/1.tar", "s3://b/1.tar"]) == ""
    assert common_root(["/a/b/1.tar"]) == "/a/b" and common_root(["/a/b/1.tar", "/a/c/1.tar"]) == "/a"
