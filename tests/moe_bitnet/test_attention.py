import pytest
import torch
from factories import ListCache, randomize, tiny_config
from numerics import assert_matches_definition, rms

from moe_bitnet.attention import Attention, causal_attention

NORM_RECIPES = ("sub_norm", "inner_norm")


def make_attention(**changes):
    config = tiny_config(**changes)
    return randomize(Attention(config, 0)), config


def assert_is_attention(output, attention, config, x):
    state = attention.state_dict()

    def definition(x, *tensors):
        return [attention_twin(dict(zip(state, tensors, strict=True)), config, x)]

    assert_matches_definition([output], definition, [x, *state.values()])


def attention_twin(state, config, x):
    """One query at a time, with complex rotation and repeated heads, for float precision."""
    dtype = x.dtype

    def norm(rows, name):
        if name not in state:
            return rows
        return rms(rows, config.norm_eps) * state[name]

    def turned(rows):
        half = config.head_dim // 2
        angles = torch.arange(rows.shape[1]).to(dtype)[:, None] * config.rope_theta ** (
            -torch.arange(half).to(dtype) / half
        )
        numbers = torch.complex(rows[..., :half], rows[..., half:])
        numbers = numbers * torch.polar(torch.ones_like(angles), angles)[:, None, :]
        return torch.cat((numbers.real, numbers.imag), -1)

    rows = norm(x, "norm.weight")
    query, key, value = (
        (norm(rows, f"{name}.norm.weight") @ state[f"{name}.weight"].T).unflatten(-1, (-1, config.head_dim))
        for name in ("q_proj", "k_proj", "v_proj")
    )
    query, key = turned(query), turned(key)
    group_size = config.num_heads // config.num_kv_heads
    outputs = torch.zeros_like(query)
    for head in range(config.num_heads):
        for position in range(x.shape[1]):
            held_key = key[:, : position + 1, head // group_size]
            held_value = value[:, : position + 1, head // group_size]
            scores = (held_key * query[:, position, None, head]).sum(-1) / config.head_dim**0.5
            outputs[:, position, head] = (scores.softmax(-1)[..., None] * held_value).sum(1)
    return norm(outputs.flatten(-2), "o_proj.norm.weight") @ state["o_proj.weight"].T


@pytest.mark.parametrize("norm_recipe", NORM_RECIPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (6, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("seq_len", [1, 7])
def test_attention_equals_the_formula(norm_recipe, num_heads, num_kv_heads, seq_len):
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "norm_recipe": norm_recipe}
    attention, config = make_attention(precision="float", **sizes)
    x = torch.randn(2, seq_len, 12)
    output = attention(x)
    assert output.dtype == torch.float32
    assert_is_attention(output, attention, config, x)


@pytest.mark.parametrize("precision", ["ternary", "float"])
@pytest.mark.parametrize("norm_recipe", NORM_RECIPES)
def test_the_norm_recipe_decides_where_norms_are(precision, norm_recipe):
    attention, _ = make_attention(norm_recipe=norm_recipe, precision=precision)
    norms = {name for name, _ in attention.named_parameters() if name.endswith("norm.weight")}
    expected = {
        "sub_norm": {"norm.weight", "o_proj.norm.weight"},
        "inner_norm": {f"{name}_proj.norm.weight" for name in "qkvo"},
    }
    assert norms == expected[norm_recipe]


def test_grouped_heads_equal_repeated_heads():
    attention, config = make_attention(precision="float", num_kv_heads=2)
    repeated, _ = make_attention(precision="float", num_kv_heads=6)
    state = attention.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(3, dim=0).flatten(0, 1)
    repeated.load_state_dict(state)
    x = torch.randn(2, 7, 12)
    assert_is_attention(attention(x), attention, config, x)
    assert_is_attention(repeated(x), attention, config, x)


@pytest.mark.parametrize("precision", ["ternary", "float"])
def test_a_later_token_never_changes_an_earlier_output(precision):
    attention, _ = make_attention(precision=precision)
    x = torch.randn(1, 7, 12)
    before = attention(x)
    for position in range(1, 7):
        changed = x.clone()
        changed[:, position] = torch.randn(12)
        after = attention(changed)
        # the same shapes and the same operations on the same rows: the same bits
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


def test_sequences_of_a_batch_do_not_see_each_other():
    attention, _ = make_attention()
    x = torch.randn(3, 7, 12)
    before = attention(x)
    x[1] = torch.randn(7, 12)
    after = attention(x)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.equal(after[1], before[1])


@pytest.mark.parametrize("chunks", [[1] * 7, [3, 1, 3], [7], [1, 6]])
@pytest.mark.parametrize("norm_recipe", NORM_RECIPES)
def test_a_cache_changes_nothing_but_rounding(chunks, norm_recipe):
    attention, config = make_attention(precision="float", norm_recipe=norm_recipe)
    x, cache = torch.randn(1, 7, 12), ListCache(1)
    parts = []
    for chunk in x.split(chunks, dim=1):
        parts.append(attention(chunk, cache))
    assert cache.length == 7
    assert_is_attention(torch.cat(parts, dim=1), attention, config, x)


def test_the_cache_gets_rotated_keys_and_plain_values_of_its_layer():
    config = tiny_config()
    attention, x = randomize(Attention(config, 1)), torch.randn(1, 3, 12)
    cache = ListCache(2)
    attention(x, cache)
    assert not cache.keys[0]
    assert cache.keys[1][0].shape == cache.values[1][0].shape == (3, 2, 4)
    values = attention.v_proj(attention.norm(x))[0].unflatten(-1, (2, 4))
    assert torch.equal(cache.values[1][0], values)
    plain_keys = attention.k_proj(attention.norm(x))[0].unflatten(-1, (2, 4))
    assert torch.equal(cache.keys[1][0][0], plain_keys[0]), "position 0 is not turned"
    assert not torch.equal(cache.keys[1][0][1:], plain_keys[1:])


def test_causal_attention_computes_in_the_autocast_dtype():
    query, key, value = torch.randn(1, 7, 6, 4), torch.randn(1, 7, 2, 4), torch.randn(1, 7, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = causal_attention(query, key, value)
    full = causal_attention(query, key, value)
    assert low.dtype == full.dtype == torch.float32
    assert torch.equal(low, low.bfloat16().float())
    # values are convex sums: a relative error of 2^-8 in inputs and result, and in the exponents of the weights
    scores = torch.einsum("bqnd,bknd->bnqk", query, key.repeat_interleave(3, 2)).abs().max() / 2
    assert (low - full).abs().max() <= value.abs().max() * 2**-8 * (4 + 4 * scores)
