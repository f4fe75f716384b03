"""Every way to compute a kernel on the CPU: each backend, and "cpp" once for each of its instruction sets."""

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest
import torch
from factories import backends_with

from moe_bitnet.errors import BackendError
from moe_bitnet.kernels import backend_cpp, registry, select
from moe_bitnet.kernels.backend_cpp import INSTRUCTION_SETS, use_instruction_set
from moe_bitnet.kernels.expert_weights import ExpertWeights
from moe_bitnet.packing import PackedTernary, pack
from moe_bitnet.tiles import tile

FORMS = {"portable": lambda packed: packed, "tiles": tile}
"""What a ternary kernel takes its weights as; the tiles are those of the plain PyTorch function."""

COLUMN_COUNTS = (*range(1, 15), 63, 64, 65)
"""Rows of activations: one tile of columns ends at 6, two at 12; from 13 on a base-3 block is expanded first."""

IN_FEATURES = (1, 3, 4, 5, 19, 20, 21, 64, 100)
"""Around a quad of 4 inputs, the 5 weights of a base-3 byte and its group of 20."""

OUT_FEATURES = (1, 63, 64, 65, 130)
"""Around a block of 64 rows."""


@dataclass(frozen=True)
class Variant:
    """A backend, and the instruction set that it is held to."""

    backend: str
    instruction_set: str | None = None

    def __str__(self):
        return "-".join(filter(None, (self.backend, self.instruction_set)))

    def select(self, operation):
        return select(operation, "cpu", self.backend)


def variants_with(*operations):
    """The variants whose backend has all ``operations`` for CPU tensors."""
    variants = []
    for name in backends_with(operations[0]):
        backend = registry().backend(name)
        if "cpu" in backend.device_types and set(operations) <= set(backend.operations):
            variants += [Variant(name, each) for each in (INSTRUCTION_SETS if name == "cpp" else (None,))]
    return variants


@contextmanager
def computing_with(variant):
    """Hold the process to a variant's instruction set; skip the test if this machine lacks it."""
    with ExitStack() as stack:
        if variant.instruction_set is not None:
            try:
                stack.enter_context(use_instruction_set(variant.instruction_set))
            except BackendError as error:
                pytest.skip(str(error))
        yield variant


class _NoLibrary:
    def __getattr__(self, name):
        raise AssertionError(f"{name} ran on arguments that should have been refused")


def operations_without_library():
    """The operations of "cpp" with nothing behind them: a call that gets beyond the checks fails the test."""
    return backend_cpp._Operations(_NoLibrary())


@contextmanager
def torch_threads(num_threads):
    """Let torch, and thereby the kernels, use ``num_threads`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_ternary(*shape, seed=0):
    return torch.randint(-1, 2, shape, generator=seeded(seed), dtype=torch.int8)


def random_packed(*shape, layout, seed=0):
    """Random matrices ``[..., out_features, in_features]`` as portable bytes, each with a scale of its own."""
    scale = torch.rand(*shape[:-2], 1, 1, generator=seeded(seed + 1)) + 1e-3
    return PackedTernary(pack(random_ternary(*shape, seed=seed), layout), scale, shape[-1], layout)


def random_rows(num_rows, in_features, seed=0):
    """Int8 rows over their whole range, and a scale for each."""
    x_q = torch.randint(-128, 128, (num_rows, in_features), generator=seeded(seed + 2), dtype=torch.int8)
    return x_q, torch.rand(num_rows, 1, generator=seeded(seed + 3)) + 1e-3


def offsets_of(counts):
    """Where each expert's rows begin, and where the last one's end."""
    return torch.tensor([0, *counts]).cumsum(0)


def equal_with_nan(first, second):
    """Whether all elements are equal, where NaN equals NaN."""
    both_nan = first.isnan() & second.isnan()
    return torch.equal(first.masked_fill(both_nan, 0), second.masked_fill(both_nan, 0))


def random_experts(num_experts, inner_size, hidden_size, layout, activation="swiglu", form="tiles", seed=0):
    """A layer's experts with random weights, given to the kernel as ``form``."""
    shapes = {"gate": (inner_size, hidden_size), "up": (inner_size, hidden_size), "down": (hidden_size, inner_size)}
    matrices = {
        name: FORMS[form](random_packed(num_experts, *shape, layout=layout, seed=seed + 10 * index))
        for index, (name, shape) in enumerate(shapes.items())
    }
    norm_weight = torch.randn(num_experts, inner_size, generator=seeded(seed + 40))
    return ExpertWeights(**matrices, norm_weight=norm_weight, norm_eps=1e-5, activation=activation)


def run_python(script, timeout_s=120, **environment):
    """Run a script in a Python process of its own, with more environment variables; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
