"""The Triton kernels on pages are right in Triton's interpreter."""

import os
from pathlib import Path

import pytest
from triton_interpreting import needs_triton, run_interpreted

FOLDER = Path(__file__).parent / "triton_interpreted"
SUBJECTS = sorted(path.stem for path in FOLDER.glob("*.py"))
TIMEOUT_S = 900


@needs_triton
@pytest.mark.parametrize("subject", SUBJECTS)
def test_interpreted(subject):
    run_interpreted(FOLDER / f"{subject}.py", "-m", "not slow", timeout_s=TIMEOUT_S)


@needs_triton
@pytest.mark.slow
def test_the_encoder_interpreted_at_length():
    run_interpreted(FOLDER / "encode.py", "-m", "slow", timeout_s=TIMEOUT_S)


def test_the_interpreted_files_are_all_there_and_leave_this_process_alone():
    assert SUBJECTS == ["attention", "encode"]
    assert "TRITON_INTERPRET" not in os.environ, "it would make every other test of Triton interpret"
