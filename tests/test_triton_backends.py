"""The Triton backends, of ternary products and of pages: absent with a reason where they cannot run."""

import importlib.util

import pytest
import torch
from triton_interpreting import needs_triton

import kvcache.kernels.backend_reference
import kvcache.kernels.backend_triton
import moe_bitnet.kernels.backend_reference
import moe_bitnet.kernels.backend_triton

TERNARY, PAGES = moe_bitnet.kernels, kvcache.kernels
both = pytest.mark.parametrize("kernels", [TERNARY, PAGES], ids=["ternary", "pages"])


@both
def test_the_backend_is_absent_without_triton(kernels, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backend = kernels.backend_triton.load_backend()
    assert backend.name == "triton"
    assert not backend.operations
    assert "not installed" in backend.absent_because


@both
def test_the_backend_is_absent_without_a_gpu(kernels, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in kernels.backend_triton.load_backend().absent_because


@needs_triton
@both
def test_the_backend_is_absent_on_old_gpus(kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0" in kernels.backend_triton.load_backend().absent_because


@needs_triton
@pytest.mark.parametrize(
    ("kernels", "missing"), [(TERNARY, {"tile", "untile"}), (PAGES, set())], ids=["ternary", "pages"]
)
def test_with_a_gpu_it_has_the_operations_of_the_reference(kernels, missing, monkeypatch):
    """All of them, but for tiling, which is done on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    backend = kernels.backend_triton.load_backend()
    assert backend.absent_because is None
    assert backend.device_types == ("cuda",)
    assert set(backend.operations) == set(kernels.backend_reference.OPERATIONS) - missing
