"""Embedding and head in float32, bfloat16 and int8: what a table holds, and what the decoder makes of it."""

import copy

import pytest
import torch
from decoder_reference import expect_sharp
from factories import tiny_model
from kernel_variants import Variant, computing_with

from moe_bitnet import inference_math
from moe_bitnet.checkpoint.pack import pack_model
from moe_bitnet.decoder import PackedDecoder
from moe_bitnet.errors import ConfigError
from moe_bitnet.kernels.backend_cpp import INSTRUCTION_SETS
from moe_bitnet.quantization import quantize_activation
from moe_bitnet.table import TABLE_FORMATS, make_table

SIZES = [(1, 12), (33, 12), (33, 1), (63, 63), (65, 64), (130, 65), (64, 100), (7, 300)]
"""(vocab_size, hidden_size) around 4 rows, a block of 64 rows and vectors of 16, 32 and 64 features."""


def random_weight(num_rows=33, features=12):
    """Rows of very different sizes, one of zeros."""
    weight = torch.randn(num_rows, features) * 10.0 ** torch.linspace(-3, 2, num_rows)[:, None]
    weight[num_rows // 2] = 0
    return weight


def test_a_float32_table_is_the_matrix():
    weight = random_weight()
    table = make_table(weight, "float32")
    assert torch.equal(table.values, weight)
    assert torch.equal(table.dequantize(), weight)
    assert table.row_scale is None
    assert table.row_sum is None
    assert table.num_bytes == 33 * 12 * 4


def test_a_bfloat16_table_is_off_by_half_an_ulp_of_bfloat16():
    weight = random_weight()
    table = make_table(weight, "bfloat16")
    assert table.values.dtype == torch.bfloat16
    # 8 bits of precision: rounding moves a value by 2^-8 of the power of two below it, at most
    assert bool(((table.dequantize() - weight).abs() <= 2**-8 * 2.0 ** weight.abs().log2().floor()).all())
    assert table.num_bytes == 33 * 12 * 2


def test_an_int8_table_is_off_by_half_a_step_of_its_row():
    weight = random_weight()
    table = make_table(weight, "int8")
    assert table.values.dtype == torch.int8
    steps = weight.abs().amax(-1).clamp_min(1e-5) / 127
    torch.testing.assert_close(table.row_scale, steps, rtol=2**-23, atol=0)
    # weight / step is rounded to float32 once before it is rounded to an integer, and the product once after it
    error = (table.dequantize().double() - weight.double()).abs() / table.row_scale[:, None].double()
    assert float(error.max()) <= 0.5 + 2 * 127 * 2**-24
    assert torch.equal(table.row_sum, table.values.sum(-1, dtype=torch.int32))
    assert table.num_bytes == 33 * 12 + 33 * 4 + 33 * 4


def test_half_precision_matrices_are_taken():
    weight = random_weight().half()
    for table_format in TABLE_FORMATS:
        expected, actual = make_table(weight.float(), table_format), make_table(weight, table_format)
        assert torch.equal(actual.values, expected.values)
        assert actual.values.dtype == expected.values.dtype


@pytest.mark.parametrize("table_format", ["", "int4", "float16", "INT8", None])
def test_an_unknown_format_is_refused(table_format):
    with pytest.raises(ConfigError, match="float32, bfloat16, int8"):
        make_table(random_weight(), table_format)


def pass_through(vocab_size, hidden_size, **changes):
    """A packed model whose layers add zeros: the head sees the embedding, normalized, to the last bit."""
    latent = tiny_model(vocab_size=vocab_size, hidden_size=hidden_size, has_tied_embeddings=False, **changes)
    with torch.no_grad():
        for block in latent.blocks:
            block.attention.o_proj.weight.zero_()
            block.moe.experts.down_weight.zero_()
    return pack_model(latent)


def head_input(model, table_format, token_id):
    """What the decoder's head multiplies, float32 ``[1, H]``."""
    row = make_table(model.embedding.weight, table_format).dequantize()[token_id : token_id + 1]
    return inference_math.rms_norm(row, model.config.norm_eps) * model.norm.weight.detach()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize(("vocab_size", "hidden_size"), SIZES)
def test_an_int8_head_multiplies_integers_exactly_and_rescales_once(vocab_size, hidden_size, instruction_set):
    model = pass_through(vocab_size, hidden_size)
    head = make_table(model.lm_head.weight, "int8")
    with computing_with(Variant("cpp", instruction_set)):
        decoder = PackedDecoder(model, 9, "int8")
        for token_id in (0, vocab_size // 2, vocab_size - 1):
            x_q, scale = quantize_activation(head_input(model, "int8", token_id))
            products = x_q.long() @ head.values.long().T
            expected = products.float() * (scale * head.row_scale)
            assert torch.equal(decoder.append([token_id])[None], expected)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("table_format", ["float32", "bfloat16"])
@pytest.mark.parametrize(("vocab_size", "hidden_size"), SIZES)
def test_a_float_head_is_off_by_no_more_than_the_rounding_of_a_sum(
    vocab_size, hidden_size, table_format, instruction_set
):
    model = pass_through(vocab_size, hidden_size)
    head = make_table(model.lm_head.weight, table_format).dequantize().double()
    with computing_with(Variant("cpp", instruction_set)):
        decoder = PackedDecoder(model, 9, table_format)
        for token_id in (0, vocab_size // 2, vocab_size - 1):
            x = head_input(model, table_format, token_id).double()
            # in whatever order the products are added, each is rounded once and passes at most H - 1 rounded sums
            bound = hidden_size * 2**-24 * (x.abs() @ head.abs().T)
            error = (decoder.append([token_id])[None].double() - x @ head.T).abs()
            assert bool((error <= bound).all())


def test_the_largest_int8_products_do_not_overflow():
    model = pass_through(33, 4000, intermediate_size=4)
    with torch.no_grad():
        model.embedding.weight.fill_(1)
        model.norm.weight.fill_(1)
        model.lm_head.weight.fill_(-1)
    logits = PackedDecoder(model, 9, "int8").append([0])
    x_q, scale = quantize_activation(head_input(model, "int8", 0))
    assert torch.equal(logits, torch.full((33,), -127.0 * 127 * 4000) * (scale[0] * (1 / torch.tensor(127.0))))
    assert bool((x_q == 127).all())


@pytest.mark.parametrize("has_tied_embeddings", [False, True])
def test_bfloat16_logits_are_those_of_a_model_with_rounded_matrices(has_tied_embeddings):
    model = pack_model(tiny_model(has_tied_embeddings=has_tied_embeddings))
    rounded = with_tables(model, "bfloat16")
    expected = expect_sharp(rounded, 65, [1, 65])
    decoder = PackedDecoder(model, 65, "bfloat16")
    expected.assert_near(decoder.append(expected.token_ids[:1]), 1)
    expected.assert_near(decoder.append(expected.token_ids[1:]), 65)


@pytest.mark.parametrize("has_tied_embeddings", [False, True])
def test_int8_logits_are_off_by_half_a_step_of_the_hidden_state(has_tied_embeddings):
    model = pack_model(tiny_model(has_tied_embeddings=has_tied_embeddings))
    rounded = with_tables(model, "int8")
    expected = expect_sharp(rounded, 65, [1, 65])
    decoder, hidden = PackedDecoder(model, 65, "int8"), []
    rounded.norm.register_forward_hook(lambda _, __, output: hidden.append(output[0]))
    with torch.inference_mode():
        rounded(torch.tensor([expected.token_ids]))
    head = rounded.embedding.weight if has_tied_embeddings else rounded.lm_head.weight
    for begin, end in [(0, 1), (1, 65)]:
        logits = decoder.append(expected.token_ids[begin:end])
        # logits - x · w = (x_q · scale - x) · w, where no element of x moved by more than half a step. The step is
        # taken from a model with a float32 cache: a little room for that, 2^-10 of it
        step = float(hidden[0][end - 1].abs().max()) / 127 * (1 + 2**-10)
        bound = 0.5 * step * head.abs().sum(-1) + expected.allowed[end - 1]
        error = (logits - expected.logits[end - 1]).abs()
        assert bool((error <= bound).all())
        assert float(error.max()) > float(expected.allowed[end - 1]), "the head was not rounded"


def with_tables(model, table_format):
    """A copy of the model with its matrices as tables of the format hold them."""
    rounded = copy.deepcopy(model)
    matrices = [rounded.embedding] if model.config.has_tied_embeddings else [rounded.embedding, rounded.lm_head]
    with torch.no_grad():
        for matrix in matrices:
            matrix.weight.copy_(make_table(matrix.weight, table_format).dequantize())
    return rounded
