"""Choice between plain torch and the Triton kernels."""

from __future__ import annotations

import pytest
import torch

from exlm_dist.kernels import backend, resolve_backend
from exlm_dist.utils.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_takes_triton_only_on_cuda_where_it_exists(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda operation: operation == "dag")
    assert resolve_backend("dag", "auto", CUDA) == "triton"
    assert resolve_backend("dag", "auto", CPU) == "torch"
    assert resolve_backend("vocab", "auto", CUDA) == "torch"
    assert resolve_backend("dag", "triton", CPU) == "triton"  # the interpreter
    assert resolve_backend("dag", "torch", CUDA) == "torch"


def test_triton_without_kernels_says_so(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda operation: False)
    with pytest.raises(ConfigError, match="attention has no Triton kernels.*'auto' or 'torch'"):
        resolve_backend("attention", "triton", CUDA)


def test_unknown_backend_lists_the_known():
    with pytest.raises(ConfigError, match="'cuda'.*auto, triton, torch"):
        resolve_backend("dag", "cuda", CPU)
