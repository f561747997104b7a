"""The members of a tar that others wrote, read once from the front, with every kind of damage found.

Readers of tars take a damaged header for the end of the archive. Here an archive ends where its mark of two zero blocks
is, and a file without it, or with anything but zeros after it, is damaged. Nothing is unpacked: a member's name is a
label and never a path, and links and devices are not followed.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from exlm_dist.utils.errors import DataError

BLOCK = tarfile.BLOCKSIZE
#: The largest member that is read as a sample, and the longest name.
MOST_BYTES, LONGEST_NAME = 64 << 20, 64 << 10
#: First bytes of a compressed file, and the program that unpacks it.
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_OTHER = {
    tarfile.LNKTYPE: "link",
    tarfile.SYMTYPE: "link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "device",
    tarfile.DIRTYPE: "folder",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}


class DamagedShard(DataError):
    """A shard that is not a whole tar; the message says where and what to do."""


@dataclass(frozen=True)
class Member:
    """One entry of a tar. `problem`: why its content is not read, empty for a file that is."""

    name: str
    offset: int  # of its content in the tar, bytes
    content: bytes
    problem: str = ""


class ShardStream:
    """The bytes of one shard from front to back, from blocks of any size, and their SHA-256 so far."""

    def __init__(self, name: str, blocks: Iterable[bytes]):
        self.name, self.position = name, 0
        self._blocks = iter(blocks)
        self._block = memoryview(b"")
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of all that was read."""
        return self._digest.hexdigest()

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end of the shard."""
        parts = list(self._parts(size))
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def skip(self, size: int) -> int:
        """Read past `size` bytes; how many there were."""
        return sum(len(part) for part in self._parts(size))

    def _parts(self, size: int) -> Iterator[memoryview]:
        while size:
            if not self._block:
                block = next(self._blocks, b"")
                if not block:
                    return
                self._digest.update(block)
                self._block = memoryview(block)
            part, self._block = self._block[:size], self._block[size:]
            size -= len(part)
            self.position += len(part)
            yield part


def read_members(stream: ShardStream) -> Iterator[Member]:
    """Every entry of the tar in order. DamagedShard where it is not whole; its end is read too."""
    extended: dict[str, str] = {}
    while True:
        start = stream.position
        header = stream.read(BLOCK)
        if start == 0:
            _refuse_compressed(stream.name, header)
        if len(header) < BLOCK:
            raise _no_end(stream.name, start, len(header))
        if not any(header):
            _check_end(stream, start)
            return
        info = _parsed(stream.name, header, start)
        size = int(extended.get("size", info.size))
        if size < 0:
            raise DamagedShard(f"{stream.name}: a member of {size} bytes at byte {start}. {_AGAIN}")
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
            if size > LONGEST_NAME:
                raise DamagedShard(f"{stream.name}: a name of {size:,} bytes at byte {start}. {_AGAIN}")
            extended |= _extension(info.type, _content(stream, start, size))
            continue
        name = extended.get("path", info.name)
        extended = {}
        problem = _OTHER.get(info.type, "" if info.type in _FILES else "unknown kind") or _unsafe(name)
        if not problem and size > MOST_BYTES:
            problem = "too large"
        offset = stream.position
        stored = 0 if problem in ("link", "device", "folder") else size
        if problem:
            if stream.skip(-(-stored // BLOCK) * BLOCK) < stored:
                raise _cut_off(stream.name, start, name)
            yield Member(name, offset, b"", problem)
        else:
            yield Member(name, offset, _content(stream, start, size, name))


_AGAIN = "Copy it again, or leave it out."


def _parsed(name: str, header: bytes, start: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DamagedShard(f"{name}: no header of a tar at byte {start} ({error}). {_AGAIN}") from error


def _refuse_compressed(name: str, header: bytes) -> None:
    for magic, tool in _COMPRESSED.items():
        if header.startswith(magic):
            raise DamagedShard(
                f"{name}: is compressed as a whole, so no sample in it can be read without all before it. Unpack it "
                f"and index the tar (members in it may be gzipped each): {tool} -dc {name} > NEW.tar"
            )


def _content(stream: ShardStream, start: int, size: int, name: str = "") -> bytes:
    content = stream.read(size)
    if len(content) < size or stream.skip(-size % BLOCK) < -size % BLOCK:
        raise _cut_off(stream.name, start, name)
    return content


def _extension(kind: bytes, content: bytes) -> dict[str, str]:
    """What an extended header says of the next member: its name and size."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if kind != tarfile.XHDTYPE:
        return {}
    found: dict[str, str] = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not 5 <= int(length) <= len(content):
            break
        record, content = content[len(length) + 1 : int(length) - 1], content[int(length) :]
        key, _, value = record.partition(b"=")
        if key == b"path" or (key == b"size" and value.isdigit()):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
    return found


def _unsafe(name: str) -> str:
    return "unsafe name" if name.startswith("/") or ".." in name.split("/") or "\0" in name else ""


def _check_end(stream: ShardStream, start: int) -> None:
    block = stream.read(BLOCK)
    if len(block) < BLOCK:
        raise _no_end(stream.name, start, len(block))
    while block:
        if block.count(0) != len(block):
            raise DamagedShard(
                f"{stream.name}: zeros from byte {start} on, as at the end of a tar, but more content before byte "
                f"{stream.position}: a zeroed block, or several tars joined. Copy it again; of joined ones, index each."
            )
        block = stream.read(1 << 20)


def _no_end(name: str, start: int, got: int) -> DamagedShard:
    if start == 0 and got == 0:
        return DamagedShard(f"{name}: is empty. {_AGAIN}")
    return DamagedShard(
        f"{name}: ends at byte {start + got} without the mark that ends a tar (two blocks of zeros): cut off. Copy it "
        f"again; if its writer left out the mark and it is whole, add it: head -c 1024 /dev/zero >> {name}"
    )


def _cut_off(name: str, start: int, member: str) -> DamagedShard:
    return DamagedShard(f"{name}: cut off within the member {member!r} whose header is at byte {start}. {_AGAIN}")
