"""The Triton backend of pages: absent with a reason here, and right in Triton's interpreter.

Interpreting is a property of a process: triton reads ``TRITON_INTERPRET`` when it is imported. So the files in
``triton_interpreted/`` are not collected with the others; each runs here in a pytest of its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvcache.kernels import backend_reference, backend_triton

FOLDER = Path(__file__).parent / "triton_interpreted"
ROOT = Path(__file__).resolve().parents[3]
SUBJECTS = sorted(path.stem for path in FOLDER.glob("*.py"))

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_interpreted(subject, marker):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", marker, str(FOLDER / f"{subject}.py")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout


@needs_triton
@pytest.mark.parametrize("subject", SUBJECTS)
def test_interpreted(subject):
    run_interpreted(subject, "not slow")


@needs_triton
@pytest.mark.slow
def test_the_encoder_interpreted_at_length():
    run_interpreted("encode", "slow")


def test_the_interpreted_files_are_all_there_and_leave_this_process_alone():
    assert SUBJECTS == ["attention", "encode"]
    assert "TRITON_INTERPRET" not in os.environ, "it would make every other test of Triton interpret"


def test_the_backend_is_absent_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backend = backend_triton.load_backend()
    assert backend.name == "triton"
    assert not backend.operations
    assert "not installed" in backend.absent_because


def test_the_backend_is_absent_without_a_gpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in backend_triton.load_backend().absent_because


@needs_triton
def test_the_backend_is_absent_on_old_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "8.0" in backend_triton.load_backend().absent_because


@needs_triton
def test_with_a_gpu_it_has_the_operations_of_the_reference(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    backend = backend_triton.load_backend()
    assert backend.absent_because is None
    assert backend.device_types == ("cuda",)
    assert set(backend.operations) == set(backend_reference.OPERATIONS)
