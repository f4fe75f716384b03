"""Small layers and traces to place."""

import numpy as np

from cluster.placement.layer_problem import LayerProblem


def choices_of(num_tokens, num_experts, top_k, seed=0, skew=1.0):
    """``expert_indices [T, K]``, all different within a row; some experts are likelier than others."""
    generator = np.random.default_rng(seed)
    scores = generator.gumbel(size=(num_tokens, num_experts)) + skew * generator.normal(size=num_experts)
    topics = generator.integers(0, 3, num_tokens)[:, None] == generator.integers(0, 3, num_experts)
    return np.argsort(-scores - 2.0 * topics, axis=1)[:, :top_k]


def layer_of(num_experts, num_devices, top_k=2, seed=0, num_tokens=40, max_imbalance=1.2, spare=1, has_costs=False):
    """A layer with room for ``spare`` experts more than an even share on each device; visits may cost differently."""
    generator = np.random.default_rng(seed + 1000)
    choices = choices_of(num_tokens, num_experts, top_k, seed)
    loads = np.bincount(choices.ravel(), minlength=num_experts).astype(float)
    visit_costs = generator.integers(1, 4, num_devices).astype(float) if has_costs else np.ones(num_devices)
    visit_costs[0] = 0.0
    shape = (num_experts, num_devices)
    return LayerProblem(
        expert_indices=choices,
        expert_loads=loads,
        max_counts=np.full(num_devices, -(-num_experts // num_devices) + spare),
        visit_costs=visit_costs,
        load_cap=max_imbalance * loads.sum() / num_devices,
        expert_costs=generator.integers(0, 5, shape).astype(float) if has_costs else np.zeros(shape),
    )


def even_start(problem):
    """Device indices of contiguous experts, as even as can be."""
    return np.arange(problem.num_experts) * problem.num_devices // problem.num_experts
