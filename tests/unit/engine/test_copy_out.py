"""Copying the state of an engine for a save, on a device that is not there."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import torch

from exlm_dist.training.engine.state import copy_out


def test_the_copy_of_a_save_is_on_the_device_of_the_rank_before_it_touches_any(monkeypatch):
    """In a thread, which starts on the first GPU: leaving a stream returns to the device that was current before."""
    done = []

    @contextlib.contextmanager
    def use(stream):
        done.append(("stream", threading.get_ident()))
        yield

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append((device, threading.get_ident())))
    monkeypatch.setattr(torch.cuda, "stream", use)
    stream = SimpleNamespace(device=torch.device("cuda", 5), synchronize=lambda: None)
    into = torch.zeros(3)
    thread = threading.Thread(target=copy_out, args=([torch.ones(2), torch.full((1,), 2.0)], into, stream))
    thread.start()
    thread.join()
    assert done == [(torch.device("cuda", 5), thread.ident), ("stream", thread.ident)] and into.tolist() == [1, 1, 2]
