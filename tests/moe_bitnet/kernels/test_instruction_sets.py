"""The instruction sets of the C++ kernels: the same bits from all, chosen by the machine or by name."""

import json

import pytest
import torch
from kernel_variants import offsets_of, random_experts, random_rows, run_python

from moe_bitnet.errors import BackendError
from moe_bitnet.kernels import select
from moe_bitnet.kernels.backend_cpp import INSTRUCTION_SETS, instruction_set, load_backend, use_instruction_set
from moe_bitnet.packing import LAYOUTS


def supported():
    """The instruction sets of this machine."""
    names = []
    for name in INSTRUCTION_SETS:
        try:
            with use_instruction_set(name):
                names.append(instruction_set())
        except BackendError:
            pass
    return names


def assert_same_bits_everywhere(compute):
    """Float results too: no fused multiply-add, no other order of a sum, no other exp."""
    names = supported()
    if len(names) < 2:
        pytest.skip(f"this machine has no instruction set but {names}")
    results = {}
    for name in names:
        with use_instruction_set(name):
            results[name] = compute()
    for name in names[1:]:
        for mine, plain in zip(results[name], results[names[0]], strict=True):
            assert torch.equal(mine.view(torch.uint8), plain.view(torch.uint8)), f"{name} differs from {names[0]}"


@pytest.mark.parametrize("activation", ["swiglu", "squared_relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_have_the_same_bits(layout, activation):
    experts, counts = random_experts(7, 200, 130, layout, activation), [0, 1, 2, 7, 13, 40, 0]
    x_q, scale = random_rows(sum(counts), 130)
    scale *= 10.0 ** torch.linspace(-4, 2, sum(counts))[:, None]  # gates from nearly linear to saturated
    assert_same_bits_everywhere(lambda: [select("expert_ffn", "cpu", "cpp")(x_q, scale, experts, offsets_of(counts))])


@pytest.mark.parametrize("num_features", [1, 7, 31, 1000])
def test_norms_and_quantization_have_the_same_bits(num_features):
    x, gain = torch.randn(200, num_features) * 10.0 ** torch.linspace(-8, 8, 200)[:, None], torch.randn(num_features)
    assert_same_bits_everywhere(lambda: select("rms_norm_quantize", "cpu", "cpp")(x, gain, 1e-5))
    assert_same_bits_everywhere(lambda: select("quantize_activation", "cpu", "cpp")(x))


def test_another_instruction_set_is_used_inside_the_block_alone():
    before = instruction_set()
    with use_instruction_set("scalar"):
        assert instruction_set() == "scalar"
        with use_instruction_set(before):
            assert instruction_set() == before
        assert instruction_set() == "scalar"
    assert instruction_set() == before
    with pytest.raises(RuntimeError), use_instruction_set("scalar"):
        raise RuntimeError
    assert instruction_set() == before, "an exception leaves the block, too"


@pytest.mark.parametrize("name", ["", "avx", "AVX2", "sse2", "avx1024"])
def test_an_unknown_instruction_set_is_refused_and_changes_nothing(name):
    before = instruction_set()
    with pytest.raises(BackendError, match="not supported"), use_instruction_set(name):
        pass
    assert instruction_set() == before


def test_a_name_that_is_unknown_makes_the_backend_absent(monkeypatch):
    monkeypatch.setenv("MOE_BITNET_ISA", "nonsense")
    backend = load_backend()
    assert not backend.operations
    assert "MOE_BITNET_ISA is 'nonsense'" in backend.absent_because
    assert all(name in backend.absent_because for name in INSTRUCTION_SETS)


CHOICE = """
import json, logging
logging.basicConfig()
import torch
from moe_bitnet.kernels import registry, select
from moe_bitnet.kernels.backend_cpp import instruction_set
x_q, scale = select("quantize_activation")(torch.tensor([[1.0, -2.0]]))
cpp = registry().backends[0]
print(json.dumps([x_q.tolist(), cpp.absent_because, None if cpp.absent_because else instruction_set()]))
"""


def test_a_process_with_an_unknown_name_falls_back_to_the_reference_loudly():
    process = run_python(CHOICE, MOE_BITNET_ISA="nonsense")
    assert process.returncode == 0, process.stderr
    x_q, absent_because, _ = json.loads(process.stdout)
    assert x_q == [[64, -127]]
    assert "Allowed are scalar, avx2, avx512" in absent_because
    assert "backend cpp is not available (MOE_BITNET_ISA is 'nonsense'" in process.stderr


def test_a_process_takes_the_instruction_set_that_is_named():
    process = run_python(CHOICE, MOE_BITNET_ISA="scalar")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == [[[64, -127]], None, "scalar"]
    assert not process.stderr
