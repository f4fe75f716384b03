r"""Made-up routing: clustered (topics with experts of their own) and Zipf (some experts are hot).

A token's K experts are drawn without replacement with probabilities proportional to

    clustered   exp(affinity · [expert e belongs to the token's topic] + popularity_e)
    Zipf        1 / rank_e ^ exponent

by the Gumbel top-k trick: the K largest of ``log p_e + Gumbel noise`` (Kool et al. 2019, arXiv:1903.06059).
Each layer shuffles its experts, so that neighbouring expert ids have nothing in common and a contiguous placement
has no luck. How strong the structure of real models is differs from model to model; these traces only say
what a solver can do where there is some.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cluster.routing.trace import IntArray, RoutingTrace, index_dtype
from moe_bitnet.errors import ConfigError

FloatArray = npt.NDArray[np.float64]

_BLOCK_TOKENS = 4096


def clustered_trace(
    num_tokens: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    *,
    num_topics: int = 16,
    affinity: float = 3.5,
    topic_exponent: float = 0.5,
    popularity: float = 0.3,
    run_length: int = 1,
    seed: int = 0,
) -> RoutingTrace:
    """Make a trace in which tokens of one topic prefer the same experts.

    Args:
        num_tokens: T.
        num_layers: L; the topics of tokens are the same in all layers, their experts are not.
        num_experts: E, dealt to the topics in turn.
        top_k: K.
        num_topics: at most ``num_experts``.
        affinity: an expert of the topic is ``exp(affinity)`` times as likely as another; with 128 experts and 16
            topics 3.5 puts about 60 % of the choices in the topic.
        topic_exponent: topic r is ``r ** -topic_exponent`` times as frequent as the first.
        popularity: standard deviation of each expert's own log-likelihood.
        run_length: consecutive tokens with one topic. With 1 neighbours are strangers, as in a batch of many texts.
        seed: the same seed gives the same trace.
    Raises:
        ConfigError: a size that cannot be.
    """
    _check_sizes(num_tokens=num_tokens, num_layers=num_layers, num_experts=num_experts, run_length=run_length)
    _check_range("top_k", top_k, num_experts)
    _check_range("num_topics", num_topics, num_experts)
    generator = np.random.default_rng(seed)
    frequency = np.arange(1, num_topics + 1) ** -float(topic_exponent)
    runs = generator.choice(num_topics, size=-(-num_tokens // run_length), p=frequency / frequency.sum())
    topics = np.repeat(runs, run_length)[:num_tokens]

    def layer_logits(layer_generator: np.random.Generator) -> Callable[[int, int], FloatArray]:
        topic_of_expert = layer_generator.permutation(np.arange(num_experts) % num_topics)
        own = layer_generator.normal(0.0, popularity, num_experts)
        return lambda start, stop: own + affinity * (topics[start:stop, None] == topic_of_expert)

    return _draw(num_tokens, num_layers, num_experts, top_k, generator, layer_logits)


def zipf_trace(
    num_tokens: int, num_layers: int, num_experts: int, top_k: int, *, exponent: float = 0.8, seed: int = 0
) -> RoutingTrace:
    """Make a trace in which the r-th expert of a layer is drawn in proportion to ``r ** -exponent``.

    Args:
        num_tokens: T.
        num_layers: L.
        num_experts: E.
        top_k: K.
        exponent: 0 is uniform routing.
        seed: the same seed gives the same trace.
    Raises:
        ConfigError: a size that cannot be.
    """
    _check_sizes(num_tokens=num_tokens, num_layers=num_layers, num_experts=num_experts)
    _check_range("top_k", top_k, num_experts)

    def layer_logits(layer_generator: np.random.Generator) -> Callable[[int, int], FloatArray]:
        logits = -exponent * np.log(layer_generator.permutation(num_experts) + 1.0)
        return lambda start, stop: np.broadcast_to(logits, (stop - start, num_experts))

    return _draw(num_tokens, num_layers, num_experts, top_k, np.random.default_rng(seed), layer_logits)


def _draw(
    num_tokens: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    generator: np.random.Generator,
    layer_logits: Callable[[np.random.Generator], Callable[[int, int], FloatArray]],
) -> RoutingTrace:
    expert_indices: IntArray = np.empty((num_tokens, num_layers, top_k), index_dtype(num_experts))
    for layer, layer_generator in enumerate(generator.spawn(num_layers)):
        logits = layer_logits(layer_generator)
        for start in range(0, num_tokens, _BLOCK_TOKENS):
            stop = min(start + _BLOCK_TOKENS, num_tokens)
            scores = logits(start, stop) + layer_generator.gumbel(size=(stop - start, num_experts))
            expert_indices[start:stop, layer] = np.argsort(-scores, axis=1)[:, :top_k]
    return RoutingTrace(expert_indices, num_experts)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"synthetic trace: {name} is {size!r}; give an integer of at least 1.")


def _check_range(name: str, value: int, num_experts: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= num_experts:
        raise ConfigError(f"synthetic trace: {name} is {value!r} with {num_experts} experts; give 1 to {num_experts}.")
