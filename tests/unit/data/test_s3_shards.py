"""Shards and data in buckets of a real S3 interface (moto's server) are those that lie here."""

from pathlib import Path

import numpy as np
import pytest
from foreign_shards import MOLECULES, smiles_tokenizer, text_members, write_tar

from exlm_dist.data import mirror
from exlm_dist.data.opening import open_dataset
from exlm_dist.data.remote import NotGiven, Remote
from exlm_dist.data.shard_patterns import expand_places
from exlm_dist.prepare.index_shards import index_shards

REASON = "not installed: pip install s3fs 'moto[s3]' flask flask-cors"
moto = pytest.importorskip("moto.server", reason=REASON)
s3fs = pytest.importorskip("s3fs", reason=REASON)


@pytest.fixture()
def bucket(tmp_path, monkeypatch):
    """A server with an empty bucket `shards`, where the usual variables lead to it."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "EXLM_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    mirror._mirrored.cache_clear()
    store = s3fs.S3FileSystem()
    store.makedirs("shards", exist_ok=True)
    yield store
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def read_all(folder: Path | str) -> np.ndarray:
    dataset = open_dataset(folder, "train", max_bad_records=0.0)
    tokens, _ = dataset.read(np.random.default_rng(0).permutation(len(dataset)))
    dataset.close()
    return tokens


def test_shards_in_a_bucket_are_those_that_lie_here(bucket, tmp_path):
    tokenizer = smiles_tokenizer(tmp_path / "tokenizer")
    for shard in range(2):
        path = write_tar(tmp_path / f"m-{shard}.tar", text_members(MOLECULES[40 * shard : 40 * (shard + 1)]))
        bucket.put(str(path), f"shards/zinc/{path.name}")
    assert expand_places(["s3://shards/zinc/m-*.tar"]) == [f"s3://shards/zinc/m-{shard}.tar" for shard in range(2)]
    here = index_shards([str(tmp_path / "m-{0..1}.tar")], tmp_path / "here", tokenizer=tokenizer, workers=1)
    there = index_shards(["s3://shards/zinc/m-{0..1}.tar"], tmp_path / "there", tokenizer=tokenizer, workers=1)
    assert there.manifest["fingerprint"] == here.manifest["fingerprint"]
    expected = read_all(tmp_path / "here")
    assert np.array_equal(read_all(tmp_path / "there"), expected)
    bucket.put(str(tmp_path / "there"), "shards/index", recursive=True)
    assert np.array_equal(read_all("s3://shards/index"), expected)


def test_what_is_not_there_is_said_at_once(bucket):
    for address in ("s3://shards/missing", "s3://nobody/data"):
        with pytest.raises(NotGiven, match=rf"{address}/manifest.json: FileNotFoundError.*Look at the address"):
            open_dataset(address, "train")


def test_without_credentials_only_public_buckets_are_read(bucket, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec", reason=REASON)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(NotGiven, match="NoCredentialsError.*AWS_ACCESS_KEY_ID.*FSSPEC_S3_ANON=true"):
        Remote().size("s3://shards/a.tar")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": "true"})  # what FSSPEC_S3_ANON=true gives at the import
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(NotGiven, match="FileNotFoundError"):
        Remote().size("s3://shards/a.tar")
