"""The fused decoder against the model that it was made from; tests/decoder_reference.py says what "equal" means."""

import copy
import functools
import gc
import os
import pickle
import threading
import time

import pytest
import torch
from decoder_reference import expect_sharp
from factories import HalfCache, random_token_ids, randomize, tiny_config, tiny_model
from kernel_variants import Variant, computing_with, run_python, torch_threads
from numerics import assert_matches_definition, largest_error

from kvcache import KVCacheConfig, QuantizedKVCache
from moe_bitnet.checkpoint.pack import pack_model
from moe_bitnet.decoder import MAX_TOKENS, PackedDecoder
from moe_bitnet.dispatch import sort_by_expert
from moe_bitnet.errors import BackendError, CacheFullError, CheckpointError, ConfigError, ShapeError
from moe_bitnet.generation import generate
from moe_bitnet.kernels.backend_cpp import INSTRUCTION_SETS
from moe_bitnet.model import MoETransformer
from moe_bitnet.packing import LAYOUTS
from moe_bitnet.table import TABLE_FORMATS
from moe_bitnet.tiles import block_bytes, num_row_blocks

PROMPTS = (1, 7, 63, 64, 65, 130)
"""Around a tile of 64 keys and a chunk's 8 queries a task."""

TOKENS_PER_SPLIT = 512
"""Keys that one task of a single token takes (csrc/decoder.cpp)."""

SHAPES = {
    "plain": {},
    "multi-head": {"num_kv_heads": 6},
    "one key/value head": {"num_kv_heads": 1},
    "head_dim 20": {"head_dim": 20},
    "head_dim 64": {"head_dim": 64, "num_heads": 2},
    "inner_norm": {"norm_recipe": "inner_norm", "has_tied_embeddings": False},
    "squared_relu": {"activation": "squared_relu", "hidden_size": 70},
    "one shared expert": {"num_shared_experts": 1, "norm_recipe": "inner_norm", "head_dim": 20},
    "shared experts": {"num_shared_experts": 3, "activation": "squared_relu", "has_tied_embeddings": False},
    "dense": {"num_experts": 1, "top_k": 1, "intermediate_size": 65, "norm_eps": 1e-3},
    "all experts": {"top_k": 5, "activation": "squared_relu", "norm_recipe": "inner_norm", "rope_theta": 500.0},
}

LONG = ["plain", "head_dim 20", "shared experts"]


def packed(layout="2bit", seed=0, **changes):
    return pack_model(tiny_model(seed, **changes), layout)


def tokens(count, seed=1):
    return random_token_ids(count, seed=seed).tolist()


def one_by_one(decoder, token_ids):
    """The logits after each token, ``[T, V]``."""
    return torch.stack([decoder.append([token_id]) for token_id in token_ids])


@pytest.fixture(scope="module")
def model():
    return packed()


@pytest.fixture(scope="module")
def wide():
    """A model whose steps of a single token are worth two threads (useful_threads in csrc/thread_pool.h)."""
    sizes = {"hidden_size": 1000, "intermediate_size": 1600, "num_heads": 8, "head_dim": 64, "num_layers": 1}
    return packed("base3", **sizes, num_experts=2, num_shared_experts=1, top_k=1)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_a_prompt_are_the_models(name, layout, num_layers):
    model = packed(layout, num_layers=num_layers, **SHAPES[name])
    expected = expect_sharp(model, 130, PROMPTS)
    for num_tokens in PROMPTS:
        expected.assert_near(PackedDecoder(model, 130).append(expected.token_ids[:num_tokens]), num_tokens)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("max_chunk_tokens", [1, 5, 32, 64])
def test_chunks_of_any_size_give_the_models_logits(name, max_chunk_tokens):
    model = packed(**SHAPES[name])
    expected = expect_sharp(model, 130, PROMPTS)
    decoder = PackedDecoder(model, 130, max_chunk_tokens=max_chunk_tokens)
    for num_tokens in PROMPTS:
        decoder.truncate(0)
        expected.assert_near(decoder.append(expected.token_ids[:num_tokens]), num_tokens)
        assert decoder.length == num_tokens
    decoder.truncate(0)
    for begin, end in [(0, 3), (3, 4), (4, 63), (63, 64), (64, 130)]:
        logits = decoder.append(expected.token_ids[begin:end])
    expected.assert_near(logits, 130)


@functools.cache
def long_sequence(name):
    """A model and what it says around the first and second split.

    It has one layer, whose keys and values have the model's bits: each step stands for itself.
    """
    model, num_tokens = packed(num_layers=1, **SHAPES[name]), 2 * TOKENS_PER_SPLIT + 70
    positions = [TOKENS_PER_SPLIT - 1, TOKENS_PER_SPLIT, TOKENS_PER_SPLIT + 1]
    return model, expect_sharp(model, num_tokens, [130, *positions, *(TOKENS_PER_SPLIT + each for each in positions)])


@pytest.mark.parametrize("name", LONG)
def test_single_tokens_beyond_one_and_two_splits_give_the_models_logits(name):
    model, expected = long_sequence(name)
    num_tokens = len(expected.token_ids)
    # more splits than rows of a chunk: the partial results need room for both
    logits = one_by_one(PackedDecoder(model, num_tokens, max_chunk_tokens=1), expected.token_ids)
    checked = expected.is_sharp.nonzero().flatten().tolist()
    assert len(checked) > 0.95 * num_tokens
    for index in checked:
        expected.assert_near(logits[index], index + 1)
    # a prompt of the same tokens, then one step over all splits
    decoder = PackedDecoder(model, num_tokens)
    decoder.append(expected.token_ids[: 2 * TOKENS_PER_SPLIT])
    expected.assert_near(decoder.append([expected.token_ids[2 * TOKENS_PER_SPLIT]]), 2 * TOKENS_PER_SPLIT + 1)


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_instruction_set_gives_the_models_logits(name, instruction_set):
    # fused multiply-adds in attention differ between them, so each is held to the model and not to another
    model, expected = long_sequence(name)
    with computing_with(Variant("cpp", instruction_set)):
        decoder = PackedDecoder(model, len(expected.token_ids))
        expected.assert_near(decoder.append(expected.token_ids[:130]), 130)
        steps = one_by_one(decoder, expected.token_ids[130 : 2 * TOKENS_PER_SPLIT + 1])
    for num_tokens in (TOKENS_PER_SPLIT, TOKENS_PER_SPLIT + 1, 2 * TOKENS_PER_SPLIT + 1):
        expected.assert_near(steps[num_tokens - 131], num_tokens)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("scale", [1, 2**-28, 2**-36, 16], ids=["ties", "denormal", "zero", "infinite"])
def test_values_are_rounded_to_float16_half_to_even(instruction_set, scale):
    # a value projection of integers: gains times signs, both with scales that are powers of two. Sums of 70 gains
    # reach 5000 and need up to 13 bits, float16 has 11
    latent = tiny_model(num_layers=1, hidden_size=70, head_dim=64, norm_eps=1e-30)
    gain = torch.randint(1, 128, (70,)).float()
    gain[0] = 127
    activation_scale = max(scale, 2.0**-23) if scale < 1 else 1  # quantization knows none below 1e-5 / 127
    signs = (torch.rand(128, 70) < torch.linspace(0, 1, 128)[:, None]) * 2.0 - 1  # from all negative to all positive
    with torch.no_grad():
        latent.embedding.weight.fill_(1)
        latent.blocks[0].attention.norm.weight.copy_(gain * activation_scale)
        latent.blocks[0].attention.v_proj.weight.copy_(signs * (scale / activation_scale))
    with computing_with(Variant("cpp", instruction_set)):
        decoder = PackedDecoder(pack_model(latent), 9)
        decoder.append([0])
    expected = (signs @ gain * scale).half().view(2, 64)  # [heads, head_dim]
    assert torch.equal(decoder._value[0, :, 0], expected)


def moe_layer_definition(block, hidden_states):
    """A function of (hidden states, router weight) in any float dtype; its experts' outputs are the packed ones."""
    with torch.inference_mode():
        normed = block.moe.norm(hidden_states)
        count, num_tokens = block.moe.router.weight.shape[0], len(hidden_states)
        everywhere = torch.arange(count).expand(num_tokens, count)
        dispatch = sort_by_expert(everywhere, count)
        rows = block.moe.experts.prepare(normed).take(dispatch.sorted_token_indices)
        outputs = block.moe.experts.compute(rows, dispatch.expert_offsets)[dispatch.slot_positions]
        outputs = outputs.view(num_tokens, count, -1)
        routing = block.moe._visit_all(normed)
        shared = block.moe.shared_experts.run(normed, routing) if block.moe.num_shared_experts else 0 * normed

    def run(x, router_weight):
        top_logits, chosen = (normed.to(x.dtype) @ router_weight.T).topk(block.moe.router.top_k)
        of_chosen = outputs.to(x.dtype).gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
        return [x + ((of_chosen * top_logits.softmax(-1)[..., None]).sum(1) + shared.to(x.dtype))]

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "squared_relu", "one shared expert", "shared experts", "dense"])
@pytest.mark.parametrize("num_tokens", [1, 6, 33])
def test_a_moe_layer_alone_is_as_near_to_the_truth_as_the_models(name, layout, num_tokens):
    # behind the router there is no quantizer: expert outputs are bits, and weights and sums are rounded
    model = packed(layout, **SHAPES[name])
    x = torch.randn(num_tokens, model.config.hidden_size)
    decoder = PackedDecoder(model, num_tokens)
    for index, block in enumerate(model.blocks):
        definition = moe_layer_definition(block, x)
        with torch.inference_mode():
            assert_matches_definition([x + block.moe(x)[0]], definition, [x, block.moe.router.weight])
        assert_matches_definition([decoder.moe_layer(index, x)], definition, [x, block.moe.router.weight])
    assert decoder.length == 0


def test_what_is_allowed_is_rounding():
    # so that the tests above can fail: one tipped int8 value moves a logit by 2^-10 of the largest and more
    for num_layers in (1, 2):
        expected = expect_sharp(packed(num_layers=num_layers), 130, PROMPTS)
        assert bool((expected.allowed <= 2**-17 * expected.logits.abs().amax(-1)).all())


def test_one_row_of_one_visited_expert_changes_the_logits():
    latent = tiny_model(num_layers=1)
    model = pack_model(latent)
    expected = expect_sharp(model, 7, [7])
    captured = []
    handle = model.blocks[0].moe.router.register_forward_hook(lambda _, __, routing: captured.append(routing))
    with torch.inference_mode():
        model(torch.tensor([expected.token_ids]), HalfCache(1))
    handle.remove()
    visited = set(captured[0].expert_indices[-1].tolist())
    with torch.no_grad():
        for expert in range(5):
            changed = copy.deepcopy(latent)
            changed.blocks[0].moe.experts.down_weight[expert, 3].neg_()
            logits = PackedDecoder(pack_model(changed), 7).append(expected.token_ids)
            assert (largest_error(logits, expected.logits[-1]) > expected.allowed[-1]) == (expert in visited)


@pytest.mark.parametrize("num_tokens", [1, 7, 130])
def test_two_threads_give_the_bits_of_one(wide, num_tokens):
    # whoever takes a row or a block sums it up in the same order
    logits = {}
    for num_threads in (1, 2, 3):
        with torch_threads(num_threads):
            decoder = PackedDecoder(wide, 200)
            logits[num_threads] = torch.stack([decoder.append(tokens(num_tokens)), *one_by_one(decoder, tokens(9, 2))])
    assert torch.equal(logits[1], logits[2])
    assert torch.equal(logits[1], logits[3])


def test_two_threads_give_the_models_logits(wide):
    expected = expect_sharp(wide, 70, [70])
    with torch_threads(2):
        decoder = PackedDecoder(wide, 70)
        decoder.append(expected.token_ids[:-1])
        expected.assert_near(decoder.append(expected.token_ids[-1:]), 70)


# In a process of its own, where nothing else has started threads.
COUNT_THREADS = """
import os, sys
sys.path.insert(0, "tests")
import torch
from factories import tiny_model
from moe_bitnet.checkpoint.pack import pack_model
from moe_bitnet.decoder import PackedDecoder

torch.set_num_threads(1)
sizes = {"hidden_size": 1000, "intermediate_size": 3200, "num_heads": 8, "head_dim": 64, "num_layers": 1}
model = pack_model(tiny_model(**sizes, num_experts=2, num_shared_experts=1, top_k=1))
counts = []
for num_threads in (1, 2):
    torch.set_num_threads(num_threads)
    decoder = PackedDecoder(model, 3)
    torch.set_num_threads(1)
    before = len(os.listdir("/proc/self/task"))
    decoder.append([1])
    counts.append(len(os.listdir("/proc/self/task")) - before)
print(counts)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc/self/task")
def test_a_decoder_uses_the_threads_that_torch_had_when_it_was_made():
    process = run_python(COUNT_THREADS, OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr
    assert process.stdout.split("\n")[0] == "[0, 1]"


def test_decoders_of_one_model_run_at_once_in_two_python_threads(wide):
    expected = PackedDecoder(wide, 64).append(tokens(40)), one_by_one(PackedDecoder(wide, 64), tokens(10, 2))
    with torch_threads(2):
        decoders = [PackedDecoder(wide, 64) for _ in range(2)]
    results, start = {}, threading.Barrier(2)

    def work(index):
        decoder = decoders[index]
        start.wait(60)
        for _ in range(3):
            prompt = decoder.append(tokens(40))
            decoder.truncate(0)
            steps = one_by_one(decoder, tokens(10, 2))
            decoder.truncate(0)
            results.setdefault(index, []).append(torch.equal(prompt, expected[0]) and torch.equal(steps, expected[1]))

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {0: [True] * 3, 1: [True] * 3}


def sharp_model(**changes):
    """Its best token leads clearly, as a trained model's does: each token's head row is its successor's embedding."""
    latent = MoETransformer(tiny_config(has_tied_embeddings=False, hidden_size=64, **changes))
    randomize(latent)
    with torch.no_grad():
        latent.embedding.weight.mul_(10)
        latent.lm_head.weight.copy_(latent.embedding.weight.roll(1, 0))
    return pack_model(latent.eval())


@pytest.mark.parametrize(
    "changes", [{"num_layers": 1, "head_dim": 16}, {"num_layers": 4, "num_shared_experts": 1, "head_dim": 64}]
)
def test_greedy_text_is_that_of_the_model_with_a_cache(changes):
    model = sharp_model(**changes)
    config = model.config
    prompt, count = tokens(9), 80
    plain = generate(model, prompt, count, cache=HalfCache(config.num_layers))
    logits = one_by_one(PackedDecoder(model, 100), [*prompt, *plain])[len(prompt) - 1 : -1]
    best = logits.topk(2).values
    assert float((best[:, 0] - best[:, 1]).min()) > 0.02 * float(best.max()), "the model is not sharp"
    assert len(set(plain)) > 5
    assert generate(PackedDecoder(model, 100), prompt, count) == plain
    paged = QuantizedKVCache(KVCacheConfig(config.num_layers, config.num_kv_heads, config.head_dim, 16, 16), 4_000_000)
    assert generate(model, prompt, count, cache=paged) == plain


def test_sampled_text_and_stop_tokens_are_those_of_the_model(model):
    arguments = {"temperature": 2.0, "top_p": 0.9, "seed": 5}
    plain = generate(model, [1, 30, 7], 20, cache=HalfCache(2), **arguments)
    seen = []
    assert generate(PackedDecoder(model, 23), [1, 30, 7], 20, on_token=seen.append, **arguments) == plain == seen
    stop_id = plain[7]
    expected = plain[: plain.index(stop_id)]
    assert generate(PackedDecoder(model, 23), [1, 30, 7], 20, stop_id=stop_id, **arguments) == expected


def test_generating_computes_each_token_once_and_the_last_not_at_all(model):
    decoder = PackedDecoder(model, 12)
    assert len(generate(decoder, [1, 30, 7], 10)) == 10
    assert decoder.length == 12


def test_generating_refuses_a_used_decoder_and_a_second_cache(model):
    decoder = PackedDecoder(model, 20)
    with pytest.raises(ConfigError, match="Give no cache"):
        generate(decoder, [1], 3, cache=HalfCache(2))
    assert decoder.length == 0
    decoder.append([1, 2])
    with pytest.raises(ConfigError, match="holds 2 tokens already"):
        generate(decoder, [1], 3)
    assert decoder.length == 2


@pytest.mark.parametrize("kept", [0, 1, 63, 64, 65, 99])
def test_what_is_appended_after_truncating_is_as_if_the_rest_never_was(model, kept):
    # both in single steps: the same calls, so the same bits
    decoder, fresh = PackedDecoder(model, 130), PackedDecoder(model, 130)
    for token_id in tokens(100):
        decoder.append([token_id])
    for token_id in tokens(100)[:kept]:
        fresh.append([token_id])
    decoder.truncate(kept)
    assert decoder.length == kept
    later = tokens(30, seed=2)
    assert torch.equal(one_by_one(decoder, later), one_by_one(fresh, later))
    decoder.truncate(0)
    assert torch.equal(decoder.append(later), PackedDecoder(model, 130).append(later))


def test_truncating_to_what_is_not_held_is_refused(model):
    decoder = PackedDecoder(model, 9)
    decoder.append([1, 2, 3])
    for length in (-1, 4):
        with pytest.raises(ConfigError, match="3 tokens are held"):
            decoder.truncate(length)
    decoder.truncate(3)
    assert decoder.length == 3


@pytest.mark.parametrize(
    ("token_ids", "error"),
    [
        ([], ShapeError),
        ([33], ShapeError),
        ([1.5], ShapeError),
        ([1, -1], ShapeError),
        ([1, 2**40], ShapeError),
        ([0] * 6, CacheFullError),
    ],
)
def test_a_failing_append_changes_nothing(model, token_ids, error):
    decoder, fresh = PackedDecoder(model, 10, max_chunk_tokens=2), PackedDecoder(model, 10, max_chunk_tokens=2)
    for each in (decoder, fresh):
        each.append([1, 2, 3, 4, 5])
    with pytest.raises(error):
        decoder.append(token_ids)
    assert decoder.length == 5
    assert torch.equal(decoder.append([6, 7, 8, 9, 10]), fresh.append([6, 7, 8, 9, 10]))
    with pytest.raises(CacheFullError, match="max_tokens 10"):
        decoder.append([1])


def test_models_that_are_not_packed_are_refused():
    for latent in (tiny_model(), tiny_model(precision="float")):
        with pytest.raises(CheckpointError, match="not packed"):
            PackedDecoder(latent, 9)


def test_a_model_whose_experts_are_elsewhere_is_refused():
    model = packed()

    class Elsewhere:
        def run(self, hidden_states, routing):
            return hidden_states

    model.replace_experts([Elsewhere(), Elsewhere()])
    with pytest.raises(CheckpointError, match="elsewhere"):
        PackedDecoder(model, 9)


@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": MAX_TOKENS + 1}, {"max_tokens": 10**30},
     {"max_chunk_tokens": 0}, {"table_format": "int4"}, {"table_format": "float16"}],
)  # fmt: skip
def test_impossible_settings_are_refused(model, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PackedDecoder(model, **{"max_tokens": 9, **wrong})


def test_memory_that_is_refused_is_an_error_of_ours(model, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("moe_bitnet.decoder.torch.zeros", refuse)
    with pytest.raises(BackendError, match="Lower max_tokens"):
        PackedDecoder(model, 9)


@pytest.mark.parametrize(
    ("layer_index", "shape"), [(2, (1, 12)), (-1, (1, 12)), (0, (0, 12)), (0, (6, 12)), (0, (1, 11)), (0, (12,))]
)
def test_moe_layer_refuses_what_does_not_fit(model, layer_index, shape):
    with pytest.raises(ShapeError, match="moe_layer"):
        PackedDecoder(model, 9, max_chunk_tokens=5).moe_layer(layer_index, torch.zeros(shape))


def test_a_moe_layer_leaves_its_input_alone(model):
    x = torch.randn(3, 12, dtype=torch.float64)
    before = x.clone()
    output = PackedDecoder(model, 9).moe_layer(0, x)
    assert output.dtype == torch.float32
    assert torch.equal(x, before)


@pytest.mark.parametrize("table_format", TABLE_FORMATS)
def test_a_decoder_outlives_its_model(table_format):
    model = packed(has_tied_embeddings=False, num_shared_experts=1, norm_recipe="inner_norm")
    expected = PackedDecoder(model, 40, table_format).append(tokens(40))
    decoder = PackedDecoder(model, 40, table_format)
    del model
    gc.collect()
    litter = [torch.full((size,), 255, dtype=torch.uint8) for size in range(64, 4096, 64) for _ in range(4)]
    assert torch.equal(decoder.append(tokens(40)), expected)
    del litter


def test_a_decoder_cannot_be_copied(model):
    # two owners of one piece of memory would free it twice
    decoder = PackedDecoder(model, 9)
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied"):
            duplicate(decoder)


def test_the_profile_is_the_time_of_the_calls_since_the_last_one(wide):
    with torch_threads(1):  # with more, what threads wait for each other is "other", and depends on the machine's load
        decoder = PackedDecoder(wide, 200)
    assert decoder.profile().total_s == 0
    start_s = time.perf_counter()
    decoder.append(tokens(180))
    decoder.append(tokens(20))
    elapsed_s = time.perf_counter() - start_s
    profile = decoder.profile()
    # what is not the library's is a moment of Python before and after each call
    assert 0.5 * elapsed_s < profile.total_s <= elapsed_s
    assert min(profile.products_s, profile.attention_s, profile.head_s, profile.other_s) > 0
    assert profile.products_s == max(profile.products_s, profile.attention_s, profile.head_s, profile.other_s)
    assert decoder.profile().total_s == 0
    decoder.moe_layer(0, torch.randn(5, 1000))
    assert decoder.profile().products_s > 0
    assert decoder.profile().head_s == 0


def matrix_bytes(num_matrices, out_features, in_features, layout):
    return num_matrices * (num_row_blocks(out_features) * block_bytes(in_features, layout) + 4)


@pytest.mark.parametrize("table_format", TABLE_FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_tied_embeddings", [False, True])
@pytest.mark.parametrize("norm_recipe", ["sub_norm", "inner_norm"])
def test_bytes_follow_from_the_shapes(layout, table_format, has_tied_embeddings, norm_recipe):
    model = packed(
        layout, head_dim=20, num_shared_experts=1, has_tied_embeddings=has_tied_embeddings, norm_recipe=norm_recipe
    )
    decoder = PackedDecoder(model, 65, table_format)
    hidden, inner, query, kv, vocab = 12, 7, 6 * 20, 2 * 20, 33
    attention = sum(
        matrix_bytes(1, *sizes, layout) for sizes in [(query, hidden), (kv, hidden), (kv, hidden), (hidden, query)]
    )
    # the norm of a layer's experts is held for each of them; of 5 routed ones a token visits 2
    one_expert = 2 * matrix_bytes(1, inner, hidden, layout) + matrix_bytes(1, hidden, inner, layout) + 4 * inner
    norms = 4 * ((1 if norm_recipe == "sub_norm" else 3) * hidden + query + hidden)
    router = 4 * 5 * hidden
    table = vocab * {"float32": 4 * hidden, "bfloat16": 2 * hidden, "int8": hidden + 8}[table_format]
    tables = table * (1 if has_tied_embeddings else 2) + 4 * hidden
    layer = attention + norms + router + one_expert
    assert decoder.weight_bytes == 2 * (layer + 5 * one_expert) + tables
    tables = table + (0 if has_tied_embeddings else table // vocab) + 4 * hidden
    assert decoder.active_weight_bytes == 2 * (layer + 2 * one_expert) + tables
    # two tiles of 64 tokens; heads of 20 take 32; two bytes each, keys and values
    assert decoder.cache_bytes == 2 * 2 * (128 * 32) * 2 * 2
