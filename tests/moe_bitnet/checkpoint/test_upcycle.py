import pytest
import torch
from factories import random_token_ids
from llama_factory import tiny_llama

from moe_bitnet.bitlinear import BitLinear, FloatLinear, PackedBitLinear
from moe_bitnet.checkpoint.native import load_model, save_model
from moe_bitnet.checkpoint.pack import pack_model
from moe_bitnet.checkpoint.upcycle import UpcycleSettings, fit_scale, upcycle
from moe_bitnet.checkpoint.upcycle_source import dense_model
from moe_bitnet.checkpoint.upcycle_statistics import collect_statistics
from moe_bitnet.decoder import PackedDecoder
from moe_bitnet.errors import CheckpointError, ConfigError, ShapeError
from moe_bitnet.experts import FloatExperts, PackedExperts
from moe_bitnet.quantization import quantize_weight

TOKENS = random_token_ids(3, 17)
SETTINGS = [
    UpcycleSettings("mote", 4, 1),
    UpcycleSettings("mote", 3, 2, expert_width=7),
    UpcycleSettings("ternary", 3, 2),
    UpcycleSettings("ternary", 1, 1),
]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def dense(request):
    llama = tiny_llama(tie_word_embeddings=request.param)
    return dense_model(llama.config.to_dict(), llama.state_dict(), "tiny")


@pytest.fixture(scope="module")
def statistics(dense):
    return collect_statistics(dense, TOKENS)


@pytest.mark.parametrize("precision", ["ternary", "float", "int4-experts"])
@pytest.mark.parametrize(("num_experts", "top_k", "width"), [(4, 1, 0), (5, 3, 0), (3, 2, 7), (1, 1, 40)])
@torch.no_grad()
def test_a_mote_model_starts_where_the_dense_one_is(dense, statistics, precision, num_experts, top_k, width):
    settings = UpcycleSettings("mote", num_experts, top_k, width, precision)
    model = upcycle(dense, settings, statistics)
    assert torch.equal(model(TOKENS).logits, dense(TOKENS).logits)
    assert model.config.intermediate_size == (width or 40)


def test_every_part_of_new_experts_learns_from_the_second_step_on(dense, statistics):
    model = upcycle(dense, UpcycleSettings("mote", 2, 2), statistics)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        logits = model(TOKENS[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        experts = model.blocks[0].moe.experts
        learning = {name for name, parameter in experts.named_parameters() if parameter.grad.abs().max() > 0}
        assert learning == ({"down_weight"}, {"down_weight", "gate_weight", "up_weight", "norm_weight"})[step]
        assert (model.blocks[0].moe.router.weight.grad.abs().max() > 0) == (step == 1)
        optimizer.step()
        optimizer.zero_grad()


def test_slices_of_the_dense_network_follow_each_other(dense, statistics):
    experts = upcycle(dense, UpcycleSettings("mote", 3, 1, 16, "float", noise=0.0), statistics).blocks[1].moe.experts
    gate = dense.blocks[1].moe.shared_experts.gate_weight[0]
    assert torch.equal(experts.gate_weight[0], gate[:16])
    assert torch.equal(experts.gate_weight[1], gate[16:32])
    assert torch.equal(experts.gate_weight[2], torch.cat((gate[32:], gate[:8])))  # it has 40 neurons
    assert torch.equal(experts.norm_weight[1], statistics[1].inner_gain[16:32])


@torch.no_grad()
def test_any_choice_of_copies_is_the_dense_network(dense, statistics):
    one, several = (
        upcycle(dense, UpcycleSettings("ternary", num_experts, top_k, precision="float", noise=0.0), statistics)
        for num_experts, top_k in ((1, 1), (5, 2))
    )
    assert torch.allclose(several(TOKENS).logits, one(TOKENS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_calibrated_norms_keep_more_of_the_model_than_plain_ones():
    llama = tiny_llama(initializer_range=0.15)  # inner rows far from a mean square of 1, as in a real model
    dense = dense_model(llama.config.to_dict(), llama.state_dict(), "tiny")
    statistics = collect_statistics(dense, TOKENS)
    settings = UpcycleSettings("ternary", 1, 1, precision="float", noise=0.0)
    model, expected = upcycle(dense, settings, statistics), dense(TOKENS).logits
    calibrated = (model(TOKENS).logits - expected).square().mean()
    for block, of_layer in zip(model.blocks, statistics, strict=True):
        assert torch.equal(block.attention.o_proj.norm.weight, of_layer.attention_gain)
        block.attention.o_proj.norm.weight.fill_(1)
        block.moe.experts.norm_weight.fill_(1)
    assert calibrated < 0.5 * (model(TOKENS).logits - expected).square().mean()


def test_noise_tells_copies_apart_and_no_more(dense, statistics):
    experts = upcycle(dense, UpcycleSettings("ternary", 3, 1, noise=0.02), statistics).blocks[0].moe.experts
    codes = quantize_weight(experts.up_weight)[0]
    differing = (codes[0] != codes[1]).float().mean()
    assert 0 < differing < 0.05


@pytest.mark.parametrize("shape", [(33, 20), (3, 8, 65)])
def test_a_fitted_scale_is_the_best_one_for_the_same_integers(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    integers, plain_scale = quantize_weight(weight)
    fitted_integers, scale = quantize_weight(fit_scale(weight))
    assert torch.equal(fitted_integers, integers)
    assert (scale > 1.2 * plain_scale).all()

    def error(candidate):
        return (weight - integers * candidate).square().sum((-2, -1))

    assert (error(scale) < error(scale * 1.01)).all()
    assert (error(scale) < error(scale * 0.99)).all()


def test_a_router_does_not_see_what_all_tokens_share(dense, statistics):
    model = upcycle(dense, UpcycleSettings("mote", 4, 1, seed=5), statistics)
    for block, of_layer in zip(model.blocks, statistics, strict=True):
        weight = block.moe.router.weight
        assert weight.std() > 0.01
        assert (weight @ of_layer.hidden_mean).abs().max() < 1e-5
    other = upcycle(dense, UpcycleSettings("mote", 4, 1, seed=6), statistics)
    assert not torch.equal(model.blocks[0].moe.router.weight, other.blocks[0].moe.router.weight)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_the_dense_model_stays_and_shares_nothing(dense, statistics, settings):
    before = dense(TOKENS).logits
    for parameter in upcycle(dense, settings, statistics).parameters():
        parameter.zero_()
    assert torch.equal(dense(TOKENS).logits, before)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("layout", ["2bit", "base3"])
@torch.no_grad()
def test_checkpoints_and_packed_ones_give_the_same_logits(dense, statistics, settings, layout, tmp_path):
    model = upcycle(dense, settings, statistics)
    for block in model.blocks:  # so that new experts say something
        torch.nn.init.normal_(block.moe.experts.down_weight)
    expected = model(TOKENS).logits
    assert not torch.equal(expected, dense(TOKENS).logits)
    save_model(model, tmp_path / "latent")
    assert torch.equal(load_model(tmp_path / "latent")(TOKENS).logits, expected)
    packed = pack_model(model, layout)
    assert torch.equal(packed(TOKENS).logits, expected)
    save_model(packed, tmp_path / "packed")
    loaded = load_model(tmp_path / "packed")
    assert torch.equal(loaded(TOKENS).logits, expected)
    block = loaded.blocks[0]
    assert isinstance(block.moe.experts, PackedExperts)
    if settings.recipe == "mote":
        assert type(block.attention.o_proj) is FloatLinear
        assert type(block.moe.shared_experts) is FloatExperts
    else:
        assert isinstance(block.attention.o_proj, PackedBitLinear)
        assert not isinstance(block.attention.o_proj, BitLinear)


def test_the_fused_decoder_refuses_a_float_backbone_by_name(dense, statistics):
    packed = pack_model(upcycle(dense, UpcycleSettings("mote", 2, 1), statistics))
    with pytest.raises(CheckpointError, match="float backbone"):
        PackedDecoder(packed, max_tokens=8)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"recipe": "binary"}, "'binary'; allowed are mote, ternary"),
        ({"expert_width": -1}, "expert_width is -1"),
        ({"noise": -0.1}, "noise -0.1"),
        ({"recipe": "ternary", "expert_width": 8}, "expert_width 8"),
    ],
)
def test_impossible_settings_are_named(settings, named):
    with pytest.raises(ConfigError) as caught:
        UpcycleSettings(**settings)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"expert_width": 41}, "dense network's 40"), ({"num_experts": 2, "top_k": 3}, "top_k 3")],
)
def test_settings_that_do_not_fit_the_model_are_named(dense, statistics, settings, named):
    with pytest.raises(ConfigError, match=named):
        upcycle(dense, UpcycleSettings(**settings), statistics)


def test_statistics_of_another_model_are_refused(dense, statistics):
    with pytest.raises(ShapeError, match="statistics of 1 layers, the model has 2"):
        upcycle(dense, UpcycleSettings(), statistics[:1])
