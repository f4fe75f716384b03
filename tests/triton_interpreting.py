"""Triton's interpreter, a property of a process: triton reads ``TRITON_INTERPRET`` when it is imported.

So the files in ``triton_interpreted/`` folders are not collected with the others; each runs in a pytest of its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_python(*arguments, timeout_s=300, **environment):
    """Run Python in the repository with one OpenMP thread and more environment variables; returns what came of it."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def run_interpreted(file, *options, timeout_s=300):
    """Run a file's tests in the interpreter: all pass, none is skipped."""
    command = ("-m", "pytest", "-q", "-x", *options, str(file))
    result = run_python(*command, timeout_s=timeout_s, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout
