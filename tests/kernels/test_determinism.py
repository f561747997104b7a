"""torch is set for a GPU inside, and as it was found afterwards, whatever happens inside."""

from __future__ import annotations

import pytest
import torch
import torch.utils.deterministic

from exlm_dist.kernels.determinism import repeatable


def settings() -> tuple[int, bool]:
    return torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory


def test_settings_hold_inside_and_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # what the user has set stays
    before = settings()
    with pytest.raises(KeyError), repeatable(torch.device("cuda")):
        assert settings() == (1, False)
        raise KeyError
    assert settings() == before
    with repeatable(torch.device("cpu")):
        assert settings() == before
