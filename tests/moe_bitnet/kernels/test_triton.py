"""The Triton kernels of ternary products are right in Triton's interpreter; their benchmark wants a GPU."""

import os
from pathlib import Path

import pytest
from triton_interpreting import needs_triton, run_interpreted, run_python

FOLDER = Path(__file__).parent / "triton_interpreted"
SUBJECTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@needs_triton
@pytest.mark.parametrize("subject", SUBJECTS)
def test_interpreted(subject):
    run_interpreted(FOLDER / f"{subject}.py")


def test_the_interpreted_files_are_all_there_and_leave_this_process_alone():
    assert SUBJECTS == ["expert_ffn", "gpu_benchmark", "linear", "quantize"]
    assert "TRITON_INTERPRET" not in os.environ, "it would make every other test of Triton interpret"


def test_the_benchmark_says_in_one_sentence_that_it_needs_a_gpu():
    result = run_python("-m", "benchmarks.gpu_kernels", "--quick", "--json", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert "NVIDIA GPU" in result.stderr
