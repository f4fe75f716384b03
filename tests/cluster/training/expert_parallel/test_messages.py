import pytest
import torch

from cluster.training.expert_parallel.messages import RowLayout, id_dtype_for
from moe_bitnet.experts import ExpertInput
from moe_bitnet.quantization import fake_quantize_activation

HIDDEN_SIZE, TOP_K = 7, 3  # odd: nothing is aligned by chance


def layout_of(row_dtype=torch.int8, exchange_dtype=torch.float32, id_dtype=torch.int8):
    return RowLayout(HIDDEN_SIZE, TOP_K, row_dtype, exchange_dtype, id_dtype)


def total(sizes):
    return sum(sizes.values())


@pytest.mark.parametrize("num_rows", [0, 1, 33])
@pytest.mark.parametrize("id_dtype", [torch.int8, torch.int16])
def test_quantized_rows_arrive_to_the_bit(num_rows, id_dtype):
    rows = ExpertInput(*fake_quantize_activation(torch.randn(num_rows, HIDDEN_SIZE)))
    weights, ids = torch.rand(num_rows, TOP_K), torch.randint(-1, 100, (num_rows, TOP_K))
    layout = layout_of(id_dtype=id_dtype)
    message = layout.encode_dispatch(rows, weights, ids)
    assert message.dtype == torch.uint8
    assert message.shape == (num_rows, total(layout.dispatch_sizes))
    assert layout.dispatch_sizes["payload"] == HIDDEN_SIZE + 4
    found, found_weights, found_ids = layout.decode_dispatch(message)
    assert torch.equal(found.rows, rows.rows)
    assert torch.equal(found.activation_scale, rows.activation_scale)
    assert torch.equal(found_weights, weights)
    assert torch.equal(found_ids, ids)


@pytest.mark.parametrize("num_rows", [0, 1, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float_rows_sums_and_gradients_arrive_rounded_to_their_dtype_alone(num_rows, dtype):
    layout = layout_of(dtype, dtype)
    rows, weights = torch.randn(num_rows, HIDDEN_SIZE), torch.randn(num_rows, TOP_K)
    message = layout.encode_dispatch(ExpertInput(rows, None), weights, torch.zeros(num_rows, TOP_K, dtype=torch.int64))
    found, _, _ = layout.decode_dispatch(message)
    assert found.activation_scale is None
    assert message.shape[1] == total(layout.dispatch_sizes)
    for arrived in (found.rows, layout.decode_sums(layout.encode_sums(rows))):
        assert arrived.dtype == torch.float32
        assert torch.equal(arrived, rows.to(dtype).float())
    assert layout.encode_sums(rows).shape[1] == total(layout.combine_sizes)
    message = layout.encode_gradients(rows, weights)
    assert message.shape[1] == total(layout.gradient_sizes)
    of_rows, of_weights = layout.decode_gradients(message)
    assert torch.equal(of_rows, rows.to(dtype).float())
    assert torch.equal(of_weights, weights)


def test_ids_fit_their_dtype():
    for num_experts in (1, 128, 129, 2**15):
        assert torch.iinfo(id_dtype_for(num_experts)).max >= num_experts - 1
