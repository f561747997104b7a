"""Reading tars that others wrote: what webdataset reads of whole ones, and every kind of damage found."""

import io
import random
import tarfile
from collections import Counter

import pytest
import webdataset as wds
from foreign_shards import text, text_members, write_tar

from exlm_dist.data.tar_members import DamagedShard, ShardStream, read_members
from exlm_dist.utils.errors import DataError

MEMBERS = text_members(text(seed, 30) for seed in range(40))


def members_of(content: bytes, block: int = 700):
    blocks = (content[first : first + block] for first in range(0, len(content), block))
    return list(read_members(ShardStream("x.tar", blocks)))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_webdataset_reads_and_lie_where_it_is_said(tmp_path, form):
    members = [*MEMBERS, ("a/b.c/000001.big.txt", b"x" * 5000), ("empty.txt", b"")]
    if form != tarfile.USTAR_FORMAT:
        members += [("d/" * 90 + "long.txt", b"long name"), ("größe.txt", b"not ASCII")]
    path = write_tar(tmp_path / "a.tar", members, form)
    content = path.read_bytes()
    found = members_of(content)
    assert [(member.name, member.content) for member in found] == members
    assert all(content[member.offset :][: len(member.content)] == member.content for member in found)
    theirs = [value for sample in wds.WebDataset(str(path), shardshuffle=False) for value in
              (v for key, v in sample.items() if not key.startswith("__"))]  # fmt: skip
    assert theirs == [member.content for member in found]


def test_hash_is_that_of_the_file_for_blocks_of_any_size(tmp_path):
    import hashlib

    content = write_tar(tmp_path / "a.tar", MEMBERS).read_bytes()
    for size in (1, 511, 1 << 20):
        stream = ShardStream("a", (content[first : first + size] for first in range(0, len(content), size)))
        assert len(list(read_members(stream))) == len(MEMBERS)
        assert stream.sha256 == hashlib.sha256(content).hexdigest() and stream.position == len(content)


def damaged(content: bytes, kind: str) -> bytes:
    header = 20 * 1024  # of the member in the middle: each has one block of header and one of content
    changes = {
        "first header": lambda c: bytes([c[100] ^ 64]).join([c[:100], c[101:]]),
        "header within": lambda c: bytes([c[header + 100] ^ 64]).join([c[: header + 100], c[header + 101 :]]),
        "cut in a header": lambda c: c[: header + 100],
        "cut in content": lambda c: c[: header + 512 + 10],
        "cut between members": lambda c: c[:header],
        "zeroed block": lambda c: c[:header] + bytes(1024) + c[header + 1024 :],
        "empty": lambda c: b"",
        "two tars": lambda c: c + c,
        "no end": lambda c: c.rstrip(b"\0") + bytes(-len(c.rstrip(b"\0")) % 512),
    }
    return changes[kind](content)


@pytest.mark.parametrize(
    "kind",
    ["first header", "header within", "cut in a header", "cut in content", "cut between members", "zeroed block"]
    + ["empty", "two tars", "no end"],
)
def test_damage_is_found_and_named(tmp_path, kind):
    content = write_tar(tmp_path / "a.tar", MEMBERS, tarfile.USTAR_FORMAT).read_bytes()
    with pytest.raises(DamagedShard, match=r"x\.tar: .*(byte|empty)"):
        members_of(damaged(content, kind))


def test_advice_for_a_tar_without_an_end_mark_works(tmp_path):
    content = damaged(write_tar(tmp_path / "a.tar", MEMBERS).read_bytes(), "no end")
    with pytest.raises(DamagedShard, match="head -c 1024 /dev/zero >> x.tar"):
        members_of(content)
    assert len(members_of(content + bytes(1024))) == len(MEMBERS)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused_with_the_command_that_helps(kind):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{kind}") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match=r"compressed as a whole.*(gzip|bzip2|xz) -dc x\.tar > NEW\.tar"):
        members_of(stream.getvalue())


def test_links_devices_and_names_that_leave_the_folder_are_never_content():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, kind in [("l.txt", tarfile.SYMTYPE), ("h.txt", tarfile.LNKTYPE), ("p.txt", tarfile.FIFOTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("../up.txt", "/etc/x.txt", "a/../../b.txt", "good.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    found = {member.name: member.problem for member in members_of(stream.getvalue())}
    assert found == {
        "l.txt": "link", "h.txt": "link", "p.txt": "device", "../up.txt": "unsafe name", "/etc/x.txt": "unsafe name",
        "a/../../b.txt": "unsafe name", "good.txt": "", "folder": "folder",
    }  # fmt: skip
    assert all(member.content == b"" for member in members_of(stream.getvalue()) if member.problem)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_flipped_bit_is_an_error_or_is_within_one_content(tmp_path, form):
    """The checksum of a header covers it all; of what is between and in members there is none in a tar."""
    content = write_tar(tmp_path / "a.tar", MEMBERS, form).read_bytes()
    whole = members_of(content)
    generator = random.Random(0)
    outcomes = Counter()
    for _ in range(300):
        changed = bytearray(content)
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        try:
            found = members_of(bytes(changed), 1 << 16)
        except DamagedShard as error:
            outcomes["refused"] += "x.tar: " in str(error)
            continue
        assert [(one.name, one.offset, one.problem) for one in found] == [
            (one.name, one.offset, one.problem) for one in whole
        ]
        differ = sum(one.content != other.content for one, other in zip(found, whole))
        assert differ <= 1
        outcomes["content" if differ else "between"] += 1
    assert outcomes.total() == 300 and min(outcomes.values()) > 10 and len(outcomes) == 3


def test_many_flipped_bits_never_give_an_error_of_another_kind(tmp_path):
    content = write_tar(tmp_path / "a.tar", MEMBERS, tarfile.PAX_FORMAT).read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(200):
        changed = bytearray(content)
        for _ in range(4):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        try:
            assert members_of(bytes(changed), 1 << 16)
        except DamagedShard:
            refused += 1
    assert 100 < refused < 200
