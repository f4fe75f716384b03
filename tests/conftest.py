import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_pinned_backend(monkeypatch):
    monkeypatch.delenv("MOE_BITNET_BACKEND", raising=False)
