"""A web server of a folder that gives ranges, with faults by a schedule that a seed decides."""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("503", "429", "short", "wrong range", "closed", "slow", "flipped")


class RangeServer(ThreadingHTTPServer):
    """Serves `folder`; each answer is a fault with the probability `faults`, of the kinds in `kinds`, but never two in
    a row for the same range."""

    daemon_threads = True

    def __init__(self, folder: Path, faults: float = 0.0, kinds: tuple[str, ...] = FAULTS, seed: int = 0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.faults, self.kinds = folder, faults, kinds
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.given: Counter[str] = Counter()  # answers of each kind
        self.failed: set[str] = set()  # ranges whose last answer was a fault
        self.pause = 0.0

    @property
    def address(self) -> str:
        """Of the folder."""
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, what: str) -> str:
        """The kind of this answer: '' for a right one."""
        with self.lock:
            wrong = what not in self.failed and self.random.random() < self.faults
            kind = self.random.choice(self.kinds) if wrong else ""
            (self.failed.add if kind else self.failed.discard)(what)
            self.given[kind] += 1
            return kind


class _Handler(BaseHTTPRequestHandler):
    server: RangeServer

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), min(int(asked[2]), len(content) - 1)) if asked else (0, len(content) - 1)
        kind = self.server.fault(f"{self.path} {first}-{last}")
        if kind in ("503", "429"):
            self.send_error(int(kind))
            return
        if kind == "closed":
            self.close_connection = True
            return
        if kind == "wrong range":
            first, last = first + 1, max(first + 1, last)
        body = content[first : last + 1]
        if kind == "flipped" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        time.sleep(self.server.pause)
        with contextlib.suppress(OSError):  # the client did not wait
            if kind == "slow":
                self.wfile.write(body[:1])
                self.wfile.flush()
                time.sleep(2.5)
            self.wfile.write(body[: len(body) // 2] if kind == "short" else body)


@contextlib.contextmanager
def serving(folder: Path, **settings: object) -> Iterator[RangeServer]:
    """A server in a thread."""
    server = RangeServer(folder, **settings)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
