"""``benchmarks/gpu_checks.py`` in Triton's interpreter; run by ``test_triton.py``."""

import torch

from benchmarks.gpu_checks import TINY_SIZES, verify
from moe_bitnet.kernels.triton.operations import OPERATIONS

CPU = torch.device("cpu")


def test_the_kernels_pass_the_checks_of_the_benchmark():
    metrics = list(verify(dict(OPERATIONS), CPU, TINY_SIZES))
    assert {metric.metric.removeprefix("gpu_kernels.").removesuffix("_differences") for metric in metrics} == set(
        OPERATIONS
    )
    assert [metric for metric in metrics if metric.value] == []


def spoilt(name):
    """The operations with one whose first value is wrong."""

    def wrong(*arguments):
        result = OPERATIONS[name](*arguments)
        first = result[0] if isinstance(result, tuple) else result
        first[0, 0] = first[0, 0] + 100
        return result

    return {**OPERATIONS, name: wrong}


def test_the_checks_find_a_wrong_value_in_each_operation():
    for name in OPERATIONS:
        found = {metric.metric for metric in verify(spoilt(name), CPU, TINY_SIZES[:1]) if metric.value}
        assert found == {f"gpu_kernels.{name}_differences"}
