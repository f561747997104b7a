"""Shards that others wrote, read by their index: the tokens of each sample, damage, workers, and the loader above."""

from pathlib import Path

import numpy as np
import pytest
from foreign_shards import MOLECULES, npy, smiles_tokenizer, text, text_members, text_tokenizer, write_tar
from prepared_folder import overwrite

from exlm_dist.data.loader import Loader
from exlm_dist.data.opening import open_dataset
from exlm_dist.data.order import Order
from exlm_dist.data.recipe import Recipe
from exlm_dist.data.sample_text import Unusable, ending_of, record_value
from exlm_dist.prepare.index_shards import index_shards
from exlm_dist.tokenizers import load_tokenizer
from exlm_dist.utils.errors import DataError


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tokenizers")
    smiles_tokenizer(root / "smiles")
    text_tokenizer(root / "text")
    return root


@pytest.fixture
def molecules(tmp_path, tokenizers) -> Path:
    """Three shards of 76 molecules, indexed."""
    for shard in range(3):
        write_tar(tmp_path / f"m-{shard}.tar", text_members(MOLECULES[76 * shard : 76 * (shard + 1)]))
    index_shards([str(tmp_path / "m-{0..2}.tar")], tmp_path / "d", tokenizer=tokenizers / "smiles", workers=1)
    return tmp_path / "d"


def all_texts(folder: Path, split: str) -> list[str]:
    dataset = open_dataset(folder, split)
    tokens, lengths = dataset.read(np.arange(len(dataset)))
    tokenizer = load_tokenizer(folder)
    return [tokenizer.decode(part.tolist()) for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def test_every_molecule_is_in_one_split_and_in_the_order_of_the_shards(molecules):
    train, valid = all_texts(molecules, "train"), all_texts(molecules, "valid")
    assert sorted(train + valid) == sorted(MOLECULES[:228])
    assert train == [molecule for molecule in MOLECULES[:228] if molecule not in set(valid)]
    dataset = open_dataset(molecules, "train")
    assert dataset.read(np.zeros(0, np.int64))[0].tolist() == []
    with pytest.raises(IndexError):
        dataset.read(np.array([len(dataset)]))


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "json", "json.gz", "caption.jsonl", "jsonl.gz"])
def test_long_texts_become_sequences_that_have_all_their_words_in_order(tmp_path, tokenizers, ending):
    texts = [text(seed, words) for seed, words in enumerate([1, 5, 400, 3, 90, 91, 92])] + ["  a\t\n b " * 60]
    texts += ["x" * 300 + " " + text(9, 50), "\ufeffmark " + text(10, 200), "é\u2003" * 200]
    write_tar(tmp_path / "a.tar", text_members(texts, ending))
    write_tar(tmp_path / "v.tar", text_members([text(1000, 4)], ending))
    summary = index_shards(
        [str(tmp_path / "a.tar")], tmp_path / "d", tokenizer=tokenizers / "text", max_length=66, workers=1,
        valid_patterns=[str(tmp_path / "v.tar")],
    )  # fmt: skip
    tokenizer, dataset = load_tokenizer(tokenizers / "text"), open_dataset(tmp_path / "d", "train")
    if "json" not in ending:  # there it would be text
        texts = [each.removeprefix("\ufeff") for each in texts]
    expected = [token for each in texts for token in tokenizer.encode(" ".join(each.split()))]
    tokens, lengths = dataset.read(np.arange(len(dataset)))
    assert tokens.tolist() == expected and lengths.max() <= 64 and len(lengths) > 30
    shuffled = np.random.default_rng(0).permutation(len(dataset))
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    assert dataset.read(shuffled)[0].tolist() == [token for i in shuffled for token in parts[i].tolist()]
    assert summary.manifest["statistics"]["kept"] == len(texts) + 1
    if ending == "txt":
        assert dataset.index.rows(0)["size"].max() < 1000  # a page of a book, not the book


def test_ids_and_lines(tmp_path, tokenizers):
    tokenizer = load_tokenizer(tokenizers / "smiles")
    rows = [np.array(tokenizer.encode(molecule)) for molecule in MOLECULES[:9]]
    members = [(f"{i}.npy", npy(row.astype(kind))) for i, (row, kind) in enumerate(zip(rows, "bhilBHILq"))]
    write_tar(tmp_path / "ids.tar", members)
    lines = ("\n".join(f"{molecule} name-{i}" for i, molecule in enumerate(MOLECULES[:9])) + "\n\n").encode()
    write_tar(tmp_path / "lines.tar", [("all.smi", lines)])
    for name in ("ids", "lines"):
        index_shards(
            [str(tmp_path / f"{name}.tar")], tmp_path / name, tokenizer=tokenizers / "smiles", workers=1,
            valid_fraction=0.2,
        )  # fmt: skip
        found = all_texts(tmp_path / name, "train") + all_texts(tmp_path / name, "valid")
        assert sorted(found) == sorted(MOLECULES[:9])


def test_workers_give_the_same_and_end_with_the_data_set(molecules):
    ids = np.random.default_rng(0).integers(0, 200, 150)
    alone = open_dataset(molecules, "train").read(ids)
    dataset = open_dataset(molecules, "train", workers=2)
    for _ in range(2):
        tokens, lengths = dataset.read(ids)
        assert np.array_equal(tokens, alone[0]) and np.array_equal(lengths, alone[1])
    processes = list(dataset._workers._pool._processes.values())
    assert len(processes) == 2
    dataset.close()
    for process in processes:
        process.join(20)
        assert not process.is_alive()


def test_a_worker_that_is_killed_ends_the_reading_with_the_code_for_a_new_start(molecules):
    dataset = open_dataset(molecules, "train", workers=1)
    dataset.read(np.arange(100))
    for process in dataset._workers._pool._processes.values():
        process.kill()
    with pytest.raises(DataError, match="a worker process that reads data died") as caught:
        for _ in range(3):
            dataset.read(np.arange(100))
    assert caught.value.exit_code == 76
    dataset.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_named_replaced_alike_and_counted(molecules, workers):
    whole = open_dataset(molecules, "train")
    shard, record = whole.record(100)
    before, lengths = whole.read(np.arange(len(whole)))
    parts = np.split(before, np.cumsum(lengths)[:-1])
    overwrite(Path(whole.place(shard)), int(record["offset"]), b"#")
    stand_in = next(i for i in [*range(101, len(whole)), *range(100)] if lengths[i] == lengths[100])
    dataset = open_dataset(molecules, "train", max_bad_records=0.01, workers=workers)
    tokens, _ = dataset.read(np.arange(len(whole)))
    parts[100] = parts[stand_in]
    assert np.array_equal(tokens, np.concatenate(parts))
    (event,) = dataset.bad_records
    assert (event.sample, event.file, event.offset) == (100, whole.place(shard), record["offset"])
    assert (event.replacement, event.expected) == (stand_in, record["crc"]) and event.got not in (-1, event.expected)
    dataset.close()
    with pytest.raises(DataError, match="more than data.max_bad_records"):
        open_dataset(molecules, "train", max_bad_records=0.001).read(np.array([100]))


def test_a_shard_cut_off_later_is_refused_when_opened_and_bytes_missing_are_named(molecules):
    dataset = open_dataset(molecules, "train", max_bad_records=1.0)
    path = Path(dataset.place(0))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    dataset.read(np.arange(len(dataset)))
    assert dataset.bad_records and {event.got for event in dataset.bad_records} == {-1}
    with pytest.raises(DataError, match=r"m-0\.tar: \d+ bytes, \d+ expected"):
        open_dataset(molecules, "train")


@pytest.mark.parametrize("block", [0, 16])
def test_batches_are_the_same_for_any_world_size_and_from_any_step_on(molecules, block):
    dataset = open_dataset(molecules, "train", block=block, kept_blocks=6)
    order = Order(3, len(dataset), block, 3)
    recipe = Recipe(
        states=2, anchors=True, ratio=0.3, keep=0.1, random=0.1, vocab_size=dataset.vocab_size, max_positions=200,
        bucket=8, micro=8,
    )  # fmt: skip

    def step(t: int, world: int) -> list[list[int]]:
        found = []
        for rank in range(world):
            loader = Loader(dataset, recipe, order=order, global_batch=32, rank=rank, world=world, prefetch=0)
            found += [batch.input_ids.tolist() for batch in loader.step(t).micro_batches]
        return found

    assert step(9, 1) == step(9, 2) == step(9, 4) and step(9, 1) != step(8, 1)


def test_another_tokenizer_in_the_folder_is_an_error_and_not_other_tokens(molecules, tokenizers):
    dataset = open_dataset(molecules, "train")
    dataset._encoder._tokenizer._ids["C"] = 7
    dataset._encoder._tokenizer.encode_batch = lambda texts: (np.arange(5), np.array([5] + [0] * (len(texts) - 1)))
    with pytest.raises(DataError, match="another version of the tokenizer"):
        dataset.read(np.array([60, 61]))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"), ("a.txt", b"a\0b", "NUL"), ("a.json", b"{", "not JSON"),
        ("a.json", b"[1]", "not a JSON object"), ("a.json", b'{"x": 1}', "no field: text"),
        ("a.json", b'{"text": 1}', "not text"), ("a.json", b'{"text": null}', "empty"),
        ("a.json", b"[" * 99999, "JSON"),
        ("a.txt.gz", b"plain", "not gzip"), ("a.npy", b"x", "not a .npy array"),
        ("a.npy", npy(np.array([{}], object)), "one dimension of integers"),
        ("a.npy", npy(np.zeros((2, 2), int)), "one dimension of integers"), ("a.npy", npy(np.ones(3)), "integers"),
        ("a.npy", npy(np.arange(9))[:-3], "size is not that of its header"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_says_why(name, content, reason):
    ending = ending_of(name)
    with pytest.raises(Unusable, match=reason):
        record_value(content, ending.form, ending.gzip, 0, "text")
