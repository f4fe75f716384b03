"""``torch.ops.moe_bitnet``: what torch.compile sees gives the bits of plain calls, for every backend."""

import importlib
import sys

import pytest
import torch
from factories import backends_with, random_token_ids, randomize, tiny_config, tiny_model
from kernel_variants import offsets_of, random_experts, random_packed, random_rows, run_python
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import moe_bitnet.kernels
from moe_bitnet.bitlinear import BitLinear, PackedBitLinear
from moe_bitnet.checkpoint.pack import pack_model
from moe_bitnet.errors import BackendError
from moe_bitnet.experts import BitExperts, PackedExperts
from moe_bitnet.kernels import registry, select, torch_library
from moe_bitnet.packing import LAYOUTS
from moe_bitnet.router import Routing
from moe_bitnet.tiles import tile

COUNTS = ([2, 3, 1], [0, 4, 0], [0, 0, 0])
"""Rows of each expert: all have some, some have none, there are none."""

RECIPES = {
    "sub_norm swiglu": {},
    "inner_norm squared_relu shared": {
        "norm_recipe": "inner_norm",
        "activation": "squared_relu",
        "num_shared_experts": 1,
    },
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture(params=backends_with("expert_ffn"))
def _backend(request, monkeypatch):
    if "cpu" not in registry().backend(request.param).device_types:
        pytest.skip(f"{request.param} takes no CPU tensors")
    monkeypatch.setenv("MOE_BITNET_BACKEND", request.param)


def plain_calls(layout):
    """Arguments of the plain functions by operation, on sizes that fill no block."""
    x = torch.randn(7, 33)
    calls = [("quantize_activation", (rows,)) for rows in (x, x[:0], x.view(1, 7, 33).mT)]
    calls += [("rms_norm_quantize", (rows, torch.randn(rows.shape[-1]), 1e-5)) for rows in (x[:0], x.T)]
    matrix, matrices = tile(random_packed(65, 33, layout=layout)), tile(random_packed(3, 65, 33, layout=layout))
    calls += [("ternary_linear", (*random_rows(num_rows, 33), matrix)) for num_rows in (0, 7)]
    for counts, activation in zip(COUNTS, ("swiglu", "squared_relu", "swiglu"), strict=True):
        rows, offsets = random_rows(sum(counts), 33), offsets_of(counts)
        calls.append(("grouped_ternary_linear", (*rows, matrices, offsets)))
        calls.append(("expert_ffn", (*rows, random_experts(3, 7, 33, layout, activation), offsets)))
    return calls


def flat_call(operation, arguments):
    """The operator that a plain call becomes in a graph, and its arguments."""
    recorded = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == torch_library.NAMESPACE:
                recorded.append((function, args))
            return function(*args, **(kwargs or {}))

    with Recorder():
        torch_library.TRACEABLE[operation](*arguments)
    (call,) = recorded
    return call


def assert_same_bits(actual, expected):
    actual, expected = (torch.utils._pytree.tree_leaves(tree) for tree in (actual, expected))
    for mine, other in zip(actual, expected, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


class CountingBackend:
    """Compiles with "aot_eager" and keeps the graphs."""

    def __init__(self):
        self._graphs, self._compile = [], torch._dynamo.lookup_backend("aot_eager")

    def __call__(self, graph_module, example_inputs):
        self._graphs.append(graph_module.graph)
        return self._compile(graph_module, example_inputs)

    @property
    def num_graphs(self):
        """Graphs in use: torch empties one that it starts anew, as it does to make a float of its own a constant."""
        return sum(len(graph.nodes) > 0 for graph in self._graphs)

    def operations(self):
        """The ternary operations in all graphs, in their order."""
        targets = [node.target for graph in self._graphs for node in graph.nodes if node.op == "call_function"]
        return [str(target).split(".")[1] for target in targets if str(target).startswith("moe_bitnet.")]


def compile_whole(function, **options):
    counting = CountingBackend()
    return torch.compile(function, backend=counting, fullgraph=True, **options), counting


def packed_linear(layout="2bit", norm_eps=1e-5):
    linear = PackedBitLinear.from_bitlinear(randomize(BitLinear(33, 65, norm_eps)), layout)
    linear.arrange_weights()
    return linear


def packed_experts(layout="2bit", **changes):
    config = tiny_config(**changes)
    experts = PackedExperts.from_experts(randomize(BitExperts(config, 5)), config, layout)
    experts.arrange_weights()
    return experts


def random_routing(num_tokens):
    logits = torch.randn(num_tokens, 5)
    weights, indices = logits.topk(2)
    return Routing(indices, weights.softmax(dim=-1), logits)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_operation_passes_opcheck(layout):
    calls = plain_calls(layout)
    assert {operation for operation, _ in calls} == set(torch_library.SCHEMAS)
    for operation, arguments in calls:
        results = opcheck(*flat_call(operation, arguments))
        assert set(results.values()) == {"SUCCESS"}
        assert len(results) == 4


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_operation_gives_the_bits_of_its_plain_function(layout):
    for operation, arguments in plain_calls(layout):
        assert_same_bits(torch_library.TRACEABLE[operation](*arguments), select(operation)(*arguments))


def test_experts_may_differ_in_layout_and_sizes_of_each_matrix():
    experts, other = random_experts(2, 7, 33, "2bit"), random_experts(2, 7, 33, "base3")
    arguments = (*random_rows(3, 33), type(experts)(**{**vars(experts), "down": other.down}), offsets_of([1, 2]))
    assert_same_bits(torch_library.expert_ffn(*arguments), select("expert_ffn")(*arguments))


def test_shapes_and_devices_are_known_without_the_device():
    tensors = {"device": "cuda", "dtype": torch.uint8}
    with FakeTensorMode():
        x_q, scale = torch.ops.moe_bitnet.quantize_activation(torch.empty(3, 4, 5, device="cuda"))
        matrix = (torch.empty(2, 128, **tensors), torch.ones(1, 1, device="cuda"), 65, 5, "2bit")
        output = torch.ops.moe_bitnet.ternary_linear(x_q.flatten(0, 1), scale.flatten(0, 1), *matrix)
    assert (x_q.shape, x_q.dtype, x_q.device.type) == ((3, 4, 5), torch.int8, "cuda")
    assert (scale.shape, scale.dtype, scale.device.type) == ((3, 4, 1), torch.float32, "cuda")
    assert (output.shape, output.dtype, output.device.type) == ((12, 65), torch.float32, "cuda")


@pytest.mark.parametrize("operation", torch_library.SCHEMAS)
def test_every_device_of_the_reference_is_served(operation):
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_bitnet::{operation}", key)


def test_a_tensor_that_requires_a_gradient_is_refused():
    for operation, arguments in plain_calls("2bit"):
        function, flat = flat_call(operation, arguments)
        index = max(i for i, each in enumerate(flat) if isinstance(each, torch.Tensor) and each.is_floating_point())
        flat = [*flat[:index], flat[index].detach().requires_grad_(), *flat[index + 1 :]]
        with pytest.raises(RuntimeError, match=f"{operation}: .*requires a gradient.*no_grad"):
            function(*flat)
        compiled, _ = compile_whole(lambda *args, function=function: function(*args))
        with pytest.raises(RuntimeError, match=r"requires a gradient.*no_grad"):
            compiled(*flat)
        with torch.no_grad():
            outputs = function(*flat)
        assert not any(each.requires_grad for each in torch.utils._pytree.tree_leaves(outputs))
        opcheck(function, flat, test_utils="test_autograd_registration")


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("norm_eps", "first"), [(1e-5, "rms_norm_quantize"), (None, "quantize_activation")])
def test_a_linear_layer_is_one_graph(layout, norm_eps, first):
    linear, x = packed_linear(layout, norm_eps), torch.randn(2, 7, 33)
    compiled, counting = compile_whole(linear)
    with torch.no_grad():
        assert_same_bits(compiled(x), linear(x))
    assert counting.operations() == [first, "ternary_linear"]


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_one_graph(layout):
    experts, hidden_states, routing = packed_experts(layout), torch.randn(7, 12), random_routing(7)
    compiled, counting = compile_whole(experts.run)
    with torch.no_grad():
        assert_same_bits(compiled(hidden_states, routing), experts.run(hidden_states, routing))
    assert counting.operations() == ["quantize_activation", "expert_ffn"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_block_is_one_graph(recipe):
    block = pack_model(tiny_model(**RECIPES[recipe])).blocks[0]
    compiled, counting = compile_whole(block)
    hidden_states = torch.randn(2, 7, 12)
    with torch.no_grad():
        (output, statistics), (expected, expected_statistics) = compiled(hidden_states), block(hidden_states)
    assert_same_bits([output, *vars(statistics).values()], [expected, *vars(expected_statistics).values()])
    assert counting.num_graphs == 1
    num_shared = RECIPES[recipe].get("num_shared_experts", 0)
    assert counting.operations().count("ternary_linear") == 4
    assert counting.operations().count("expert_ffn") == 1 + num_shared


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_is_one_graph(recipe):
    model, token_ids = pack_model(tiny_model(**RECIPES[recipe]), "base3"), random_token_ids(2, 7)
    compiled, counting = compile_whole(model)
    with torch.inference_mode():
        assert_same_bits(list(vars(compiled(token_ids)).values()), list(vars(model(token_ids)).values()))
    assert counting.num_graphs == 1


def test_gradients_elsewhere_do_not_hinder_a_compiled_layer():
    linear, x = packed_linear(), torch.randn(7, 33, requires_grad=True)
    compiled, _ = compile_whole(linear)
    output = compiled(x)
    assert not output.requires_grad
    assert_same_bits(output, linear(x).detach())


def test_portable_bytes_are_tiled_in_the_graph():
    linear, x = PackedBitLinear.from_bitlinear(randomize(BitLinear(33, 65)), "base3"), torch.randn(7, 33)
    compiled, _ = compile_whole(linear)
    with torch.no_grad():
        assert_same_bits(compiled(x), linear(x))


def dynamic_cases():
    linear, experts, model = packed_linear(), packed_experts(), pack_model(tiny_model(num_layers=1))
    return {
        "linear": (linear, lambda num_rows: (torch.randn(num_rows, 33),)),
        "experts": (experts.run, lambda num_rows: (torch.randn(num_rows, 12), random_routing(num_rows))),
        "model": (lambda ids: model(ids).logits, lambda num_rows: (random_token_ids(1, num_rows),)),
    }


@pytest.mark.parametrize("case", ["linear", "experts", "model"])
def test_any_number_of_rows_takes_the_same_graph(case):
    function, arguments_for = dynamic_cases()[case]
    compiled, counting = compile_whole(function, dynamic=True)
    with torch.no_grad():
        for num_rows in (7, 33, 1, 64):
            arguments = arguments_for(num_rows)
            assert_same_bits(compiled(*arguments), function(*arguments))
    assert counting.num_graphs <= 2, "torch compiles a size of 1 apart, and no other"


def test_a_layer_can_be_exported():
    linear, x = packed_linear(), torch.randn(7, 33)
    with torch.no_grad():
        for is_strict in (False, True):
            exported = torch.export.export(linear, (x,), strict=is_strict)
            assert_same_bits(exported.module()(x), linear(x))


def test_a_compiled_layer_follows_the_environment(monkeypatch):
    linear, x = packed_linear(), torch.randn(7, 33)
    compiled, _ = compile_whole(linear)
    with torch.no_grad():
        compiled(x)
        monkeypatch.setenv("MOE_BITNET_BACKEND", "nothing")
        with pytest.raises(BackendError, match="'nothing' is unknown"):
            compiled(x)


def test_plain_calls_go_to_the_backend_directly(monkeypatch):
    assert select("ternary_linear") == registry().select("ternary_linear")
    monkeypatch.setattr(moe_bitnet.kernels, "is_compiling", lambda: True)
    assert select("ternary_linear") == torch_library.ternary_linear
    assert select("tile") == registry().select("tile"), "an operation of loading, never in a graph"
    assert select("ternary_linear", backend="reference") == registry().select("ternary_linear", backend="reference")


def test_the_module_may_be_imported_again(monkeypatch):
    operation, x = torch.ops.moe_bitnet.quantize_activation.default, torch.randn(3, 5)
    expected = operation(x)
    importlib.reload(torch_library)
    name = torch_library.__name__
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(moe_bitnet.kernels, "torch_library", torch_library)
    assert importlib.import_module(name) is not torch_library
    assert torch.ops.moe_bitnet.quantize_activation.default is operation
    assert_same_bits(operation(x), expected)


def test_operations_are_registered_by_importing_the_module_alone():
    script = """
import sys, torch, moe_bitnet
assert not hasattr(torch.ops.moe_bitnet, "ternary_linear")
import moe_bitnet.kernels.torch_library
assert hasattr(torch.ops.moe_bitnet, "ternary_linear")
print(*sorted({"ray", "triton", "torch._dynamo", "torch._inductor"} & set(sys.modules)))
"""
    result = run_python(script)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inductor_gives_the_same_bits_between_float_steps(layout):
    linear, experts = packed_linear(layout), packed_experts(layout)
    offsets = offsets_of([2, 0, 4, 1, 0])

    def run_experts(rows):
        return experts.compute(experts.prepare(rows), offsets)

    with torch.no_grad():
        for function, x in ((linear, torch.randn(7, 33)), (run_experts, torch.randn(7, 12))):
            assert_same_bits(torch.compile(function, backend="inductor", fullgraph=True)(x), function(x))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_inductor_runs_a_block(recipe):
    block = pack_model(tiny_model(**RECIPES[recipe])).blocks[0]
    hidden_states = torch.randn(2, 7, 12)
    with torch.no_grad():
        output, statistics = torch.compile(block, backend="inductor", fullgraph=True)(hidden_states)
        expected, expected_statistics = block(hidden_states)
    assert torch.equal(statistics.tokens_per_expert, expected_statistics.tokens_per_expert)
    # float steps are fused, so a value on the brink may be quantized to its neighbour: one of 127 steps
    assert float((output - expected).abs().max()) <= float(expected.abs().max()) / 127
