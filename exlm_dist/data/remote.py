"""Ranges of files over the network, each read with a time limit, checked, and tried again a limited number of times.

http and https are read with Python's own client, s3, gs and hf through fsspec, which finds credentials where its
packages do (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `HF_TOKEN`, ...).
"""

from __future__ import annotations

import functools
import http.client
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from exlm_dist.data.places import HTTP, scheme_of
from exlm_dist.utils.errors import EXIT_RETRY, DataError
from exlm_dist.utils.logs import get_logger

Result = TypeVar("Result")
logger = get_logger(__name__)
#: What `pip install` needs for each kind of address; `exlm_dist[remote]` has all.
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
#: Answers of a web server after which it is asked again.
PASSING = (408, 425, 429, 500, 502, 503, 504)
#: Errors of botocore that no second attempt can help.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True)
class Patience:
    """How long a range is waited for (seconds), how often it is asked for, and the first pause, which doubles."""

    attempts: int = 6
    seconds: float = 30.0
    pause: float = 0.5
    longest_pause: float = 20.0


class NotGiven(DataError):
    """A place refuses what is asked for: asking again would not help."""


class Unreachable(DataError):
    """A place that failed again and again; a later start may succeed."""

    exit_code = EXIT_RETRY


class Failed(OSError):
    """One attempt that may succeed the next time."""


class Remote:
    """Reads ranges, and counts how often it had to ask again. Thread-safe."""

    def __init__(self, patience: Patience | None = None):
        self.patience = patience or Patience()
        self.retries = 0
        self._lock = threading.Lock()

    def size(self, address: str) -> int:
        """Bytes of the file at `address`."""
        return self._retried(address, "its size", lambda: _size(address, self.patience.seconds))

    def read(self, address: str, start: int, stop: int, size: int | None = None) -> bytes:
        """Bytes start:stop of the file at `address`, which has `size` bytes (if known). DataError if it has another
        size or the place gives no ranges, Unreachable if it fails again and again."""
        what = f"bytes {start}-{stop - 1}"
        return self._retried(address, what, lambda: _range(address, start, stop, size, self.patience.seconds))

    def stream(self, address: str, size: int, block: int, ahead: int = 2) -> Iterator[bytes]:
        """The whole file in blocks, from front to back; `ahead` blocks are read while the caller works."""
        waiting: deque[Callable[[], bytes]] = deque()
        for start in range(0, size, block):
            read = functools.partial(self.read, address, start, min(start + block, size), size)
            waiting.append(in_background(read))
            if len(waiting) > ahead:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()

    def _retried(self, address: str, what: str, action: Callable[[], Result]) -> Result:
        pause = self.patience.pause
        for attempt in range(1, self.patience.attempts + 1):
            try:
                return action()
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                if attempt == self.patience.attempts:
                    raise Unreachable(
                        f"{address}: {what} could not be read in {attempt} attempts; the last one: {reason}. "
                        "Look at the network and the server, then start again."
                    ) from error
            with self._lock:
                self.retries += 1
            logger.warning("%s: %s, attempt %d failed (%s); again", address, what, attempt, reason)
            time.sleep(pause * random.uniform(0.5, 1.0))  # spreads the ranks; no result depends on it
            pause = min(2 * pause, self.patience.longest_pause)
        raise AssertionError("a last attempt returns or raises")


def in_background(action: Callable[[], Result]) -> Callable[[], Result]:
    """Start `action` in a thread that keeps no process alive; calling what is returned waits for its result."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append((action(), None))
        except BaseException as error:  # raised where the result is asked for
            outcome.append((None, error))

    thread = threading.Thread(target=work, name="exlm-remote", daemon=True)
    thread.start()

    def result() -> Result:
        thread.join()
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    return result


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system for `address`, and the path in it. DataError, with what to install, if it is not there."""
    scheme = scheme_of(address)
    package = PACKAGES[scheme]
    try:
        import fsspec

        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise DataError(
            f"{address}: {scheme}:// needs packages that are not installed ({error}). "
            f"Install them: pip install fsspec {package}   (or all at once: pip install 'exlm_dist[remote]')"
        ) from error


def _size(address: str, seconds: float) -> int:
    if scheme_of(address) in HTTP:
        return _http(address, 0, 1, None, seconds)[1]
    system, path = file_system(address)
    return int(_translated(address, lambda: system.info(path), seconds)["size"])


def _range(address: str, start: int, stop: int, size: int | None, seconds: float) -> bytes:
    if scheme_of(address) in HTTP:
        return _http(address, start, stop, size, seconds)[0]
    system, path = file_system(address)
    content = _translated(address, lambda: system.cat_file(path, start=start, end=stop), seconds)
    if len(content) != stop - start:
        raise Failed(f"{len(content)} bytes instead of {stop - start}")
    return content


def _translated(address: str, action: Callable[[], Result], seconds: float) -> Result:
    """The result of a call of fsspec, which must come in time; its refusals as NotGiven, its failures as Failed."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append((action(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, name="exlm-remote", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise Failed(f"no answer within {seconds:g} s")
    value, error = outcome[0]
    name = type(error).__name__
    if name in _NO_CREDENTIALS:
        raise NotGiven(
            f"{address}: {name}: {error}. Give them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile), or "
            "say that the bucket is public: export FSSPEC_S3_ANON=true"
        ) from error
    if isinstance(error, (FileNotFoundError, PermissionError, ImportError)):
        raise NotGiven(f"{address}: {name}: {error}. Look at the address and the credentials.") from error
    if error is not None:
        raise Failed(f"{name}: {error}") from error
    return value


def _http(address: str, start: int, stop: int, size: int | None, seconds: float) -> tuple[bytes, int]:
    """Bytes start:stop, and the size of the file."""
    deadline = time.monotonic() + seconds
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-{stop - 1}", "User-Agent": "exlm_dist"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            whole = _check_answer(address, answer, start, stop)
            if size is not None and whole != size:
                raise NotGiven(f"{address}: has {whole:,} bytes, {size:,} when it was indexed. Index or copy it again.")
            return _body(answer, stop - start, deadline), whole
    except urllib.error.HTTPError as error:
        if error.code in PASSING:
            raise Failed(f"HTTP {error.code}") from error
        raise NotGiven(
            f"{address}: HTTP {error.code} {error.reason}. Look at the address and at who may read it."
        ) from error


def _check_answer(address: str, answer: Any, start: int, stop: int) -> int:
    if answer.status == 200:
        raise NotGiven(
            f"{address}: the server sends whole files only (no ranges, as `python -m http.server`). Use one that has "
            "them (nginx, Apache, an object store), or copy the shards here."
        )
    found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if answer.status != 206 or found is None or (int(found[1]), int(found[2])) != (start, stop - 1):
        raise Failed(f"asked for bytes {start}-{stop - 1}, got {answer.headers.get('Content-Range')!r}")
    return int(found[3])


def _body(answer: Any, size: int, deadline: float) -> bytes:
    parts, got = [], 0
    while got <= size:
        if time.monotonic() > deadline:
            raise Failed(f"{got} of {size} bytes in time")
        part = answer.read1(1 << 20)
        if not part:
            break
        parts.append(part)
        got += len(part)
    if got != size:
        raise Failed(f"{got} bytes instead of {size}")
    return b"".join(parts)
