"""What a fused decoder must give: the packed model's logits, and how far float rounding may move them.

Until the first attention the decoder has the model's bits. After it the two differ by the order of float sums, in
attention, router and head. Such a difference may tip an int8 value over a tie, or a key to the next float16; then
logits move by far more than rounding. Whether that may happen is a property of the model and its tokens, so it is
measured on them, without the decoder: sequences are chosen where noise far above rounding tips nothing, and there
the decoder must agree to rounding.
"""

import copy
from dataclasses import dataclass

import torch
from factories import HalfCache, random_token_ids
from numerics import EPS

SHARP = 2**-15
"""Of the largest logit. One tipped int8 value in the last token moves its logits by 2**-10 and more."""


@dataclass(frozen=True)
class Expected:
    """Logits after each token of a sequence.

    Attributes:
        token_ids: the sequence, a list.
        logits: float32 ``[T, V]`` of the model with float16 keys and values and attention in float64.
        allowed: float32 ``[T]``, the largest distance that rounding explains.
        is_sharp: bool ``[T]``, whether noise of several ulps moves the logits by rounding alone.
    """

    token_ids: list
    logits: torch.Tensor
    allowed: torch.Tensor
    is_sharp: torch.Tensor

    def assert_near(self, logits, num_tokens):
        """Assert that ``logits`` ``[V]`` are those after ``num_tokens`` tokens."""
        assert bool(logits.isfinite().all())
        error = float((logits - self.logits[num_tokens - 1]).abs().max())
        allowed = float(self.allowed[num_tokens - 1])
        assert error <= allowed, f"{num_tokens} tokens: error {error:.3e} exceeds {allowed:.3e}"


class _ShakenCache(HalfCache):
    """Attention in float32 of queries that are off by some ulps."""

    def __init__(self, num_layers, num_ulps, generator):
        super().__init__(num_layers)
        self.num_ulps, self.generator = num_ulps, generator

    def extend(self, layer_index, query, key, value):
        return super().extend(layer_index, _shake(query, self.num_ulps, self.generator), key, value)


def expect(model, token_ids):
    """Compute what a decoder of the packed ``model`` must give after each of ``token_ids``.

    The noise is that of numerics.one_ulp_noise at the places where the decoder rounds otherwise: queries, routers and
    the head's input move by one ulp. What it moves, at most and relative to the largest logit, is taken from all
    sharp places of the sequence; four times that is allowed everywhere.
    """
    logits = model_logits(model, token_ids, HalfCache(model.config.num_layers, torch.float64))
    largest = logits.abs().amax(-1)
    is_sharp = _noise(model, token_ids, logits, num_ulps=8, num_draws=8) <= SHARP * largest
    relative = _noise(model, token_ids, logits, num_ulps=1, num_draws=4)[is_sharp] / largest[is_sharp]
    return Expected(token_ids, logits, 4 * max([EPS, *relative.tolist()]) * largest, is_sharp)


def expect_sharp(model, num_tokens, positions=None):
    """The first of 40 random sequences that is sharp after each count of tokens in ``positions`` (by default all)."""
    counts = torch.tensor(positions or range(1, num_tokens + 1))
    for seed in range(40):
        token_ids = random_token_ids(num_tokens, vocab_size=model.config.vocab_size, seed=seed).tolist()
        expected = expect(model, token_ids)
        if bool(expected.is_sharp[counts - 1].all()):
            return expected
    raise AssertionError("no sequence is sharp; the model's logits hang on ties everywhere")


@torch.inference_mode()
def model_logits(model, token_ids, cache):
    """The model's logits after each token, float32 ``[T, V]``."""
    return model(torch.tensor([token_ids]), cache).logits[0]


def _noise(model, token_ids, logits, num_ulps, num_draws):
    """How far the logits after each token move, float32 ``[T]``."""
    generator = torch.Generator().manual_seed(0)
    largest = torch.zeros(len(token_ids))
    for _ in range(num_draws):
        cache = _ShakenCache(model.config.num_layers, num_ulps, generator)
        moved = model_logits(_shaken(model, num_ulps, generator), token_ids, cache)
        largest = torch.maximum(largest, (moved - logits).abs().amax(-1))
    return largest


def _shaken(model, num_ulps, generator):
    shaken = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (shaken.norm.weight, *(block.moe.router.weight for block in shaken.blocks)):
            parameter.copy_(_shake(parameter, num_ulps, generator))
    return shaken


def _shake(x, num_ulps, generator):
    """Move every element by at most ``num_ulps`` ulps, up or down; by one ulp it is numerics.shake."""
    sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
    return x * (1 + sign * num_ulps * EPS)
