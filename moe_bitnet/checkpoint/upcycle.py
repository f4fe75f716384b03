"""From a dense model to a ternary mixture of experts that training goes on from: two recipes.

``"mote"`` (Source: Wang et al. 2025, arXiv:2506.14435): attention and the dense feed-forward network, now a shared
expert, stay in float; ternary routed experts are added beside them. Their gate and up projections are those of the
network, or slices of them; their down projections are zero. So the model starts exactly where the dense one is, and
the first gradient decides in which direction each expert writes. (Binary experts have no zero and start at 1e-5.)

``"ternary"`` (upcycling by copies: Komatsuzaki et al. 2022, arXiv:2212.05055): everything is ternary. Each routed
expert is a copy of the dense network, told apart by a little noise: weights of a token's experts sum to 1, so that
any choice of copies keeps the network's function. What is lost is lost to the two norms that a ternary block has and
a dense one has not (their gains come from calibration), and to rounding, which is most.

In both the scale of a ternary matrix is fitted: absmean rounding of a Gaussian matrix takes a scale that is a quarter
below the least-squares one. As the rounding is blind to a factor, the latent matrix is multiplied by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_bitnet.bitlinear import weight_levels
from moe_bitnet.checkpoint.upcycle_statistics import LayerStatistics
from moe_bitnet.config import ModelConfig, Precision
from moe_bitnet.errors import ConfigError, ShapeError
from moe_bitnet.experts import PROJECTIONS
from moe_bitnet.model import MoETransformer
from moe_bitnet.quantization import WeightLevels, quantize_weight

Recipe = Literal["mote", "ternary"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)

_ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_ROUTER_STD = 0.02  # as in a model from scratch
_SHARED = "moe.shared_experts."


@dataclass(frozen=True)
class UpcycleSettings:
    """How a dense model becomes a mixture.

    Attributes:
        recipe: ``"mote"`` or ``"ternary"``.
        num_experts: E, routed experts a layer.
        top_k: K, experts that each token visits. With 1 the weight of the one expert is 1 whatever the router
            says, so that the router learns from the balance of load alone.
        expert_width: inner width of a routed expert; 0 is that of the dense network. Another one takes consecutive
            neurons, each expert from where the one before ended; for ``"mote"`` alone.
        precision: of the routed experts, and of attention in the recipe ``"ternary"``.
        noise: relative size of the noise that tells copies apart.
        seed: of noise and routers.

    Raises:
        ConfigError: settings contradict each other.
    """

    recipe: Recipe = "mote"
    num_experts: int = 4
    top_k: int = 1
    expert_width: int = 0
    precision: Precision = "ternary"
    noise: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ConfigError(f"upcycle: recipe is {self.recipe!r}; allowed are {', '.join(RECIPES)}.")
        if self.expert_width < 0 or self.noise < 0:
            raise ConfigError(
                f"upcycle: expert_width is {self.expert_width} and noise {self.noise}; give 0 or more of each."
            )
        if self.recipe == "ternary" and self.expert_width:
            raise ConfigError(
                f"upcycle: expert_width {self.expert_width} would cut the network that the recipe 'ternary' replaces. "
                f"Leave it out, or take the recipe 'mote'."
            )


def upcycle(dense: MoETransformer, settings: UpcycleSettings, statistics: Sequence[LayerStatistics]) -> MoETransformer:
    """Make a mixture of a dense model.

    Args:
        dense: from :func:`moe_bitnet.checkpoint.upcycle_source.dense_model`; stays as it is.
        settings: the recipe.
        statistics: of each layer, from :func:`moe_bitnet.checkpoint.upcycle_statistics.collect_statistics`.
    Returns:
        a new model with latent weights, in evaluation mode; it shares no memory with ``dense``.
    Raises:
        ConfigError: settings and model do not fit together.
        ShapeError: ``statistics`` are of another number of layers.
    """
    config = upcycled_config(dense.config, settings)
    if len(statistics) != config.num_layers:
        raise ShapeError(
            f"upcycle: statistics of {len(statistics)} layers, the model has {config.num_layers}. "
            f"Collect them from this model."
        )
    generator = torch.Generator().manual_seed(settings.seed)
    old = {name: tensor.detach() for name, tensor in dense.state_dict().items()}
    with torch.device("meta"):
        model = MoETransformer(config)
    state: dict[str, Tensor] = {}
    for index, of_layer in enumerate(statistics):
        prefix = f"blocks.{index}."
        layer = {name.removeprefix(prefix): old[name] for name in old if name.startswith(prefix)}
        convert = _mote_layer if settings.recipe == "mote" else _ternary_layer
        new = convert(layer, config, settings, of_layer, generator)
        new["moe.router.weight"] = _router(config, of_layer.hidden_mean, generator)
        state.update({prefix + name: tensor.clone() for name, tensor in new.items()})
    state.update({name: tensor.clone() for name, tensor in old.items() if not name.startswith("blocks.")})
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(True)


def upcycled_config(dense: ModelConfig, settings: UpcycleSettings) -> ModelConfig:
    """Return the shape of the mixture that a dense model becomes.

    Raises:
        ConfigError: settings and model do not fit together.
    """
    width = dense.shared_intermediate_size
    if settings.expert_width > width:
        raise ConfigError(
            f"upcycle: expert_width {settings.expert_width} exceeds the dense network's {width}. Give at most {width}."
        )
    changes = {
        "num_experts": settings.num_experts,
        "top_k": settings.top_k,
        "intermediate_size": settings.expert_width or width,
        "precision": settings.precision,
    }
    if settings.recipe == "ternary":
        changes |= {"has_float_backbone": False, "num_shared_experts": 0, "shared_intermediate_size": 0}
    return dense.replace(**changes)


def fit_scale(weight: Tensor, levels: WeightLevels = "ternary") -> Tensor:
    """Multiply each matrix by what makes its rounded form the least-squares nearest to it.

    Args:
        weight: ``[..., out_features, in_features]``, float.
        levels: of the rounding.
    Returns:
        of the same shape: latent weights with the same integers and the fitted scale.
    """
    integers, scale = quantize_weight(weight, levels)
    integers = integers.float()
    products = (weight * integers).sum((-2, -1), keepdim=True)
    fitted = products / integers.square().sum((-2, -1), keepdim=True).clamp_min(1)
    return weight * (fitted / scale)


def _mote_layer(
    layer: dict[str, Tensor],
    config: ModelConfig,
    settings: UpcycleSettings,
    statistics: LayerStatistics,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Keep the dense layer, and put experts that start at zero beside it."""
    kept = {name: tensor for name, tensor in layer.items() if not name.startswith(("moe.experts.", "moe.router."))}
    width, dense_width = config.intermediate_size, config.shared_intermediate_size
    starts = torch.arange(config.num_experts) * width
    neurons = (starts[:, None] + torch.arange(width)) % dense_width  # [E, width]
    experts = {
        "gate": layer[f"{_SHARED}gate_weight"][0][neurons],
        "up": layer[f"{_SHARED}up_weight"][0][neurons],
    }
    noisy = {
        f"moe.experts.{name}_weight": _latent(_with_noise(weight, settings.noise, generator), config)
        for name, weight in experts.items()
    }
    down = torch.zeros(config.num_experts, config.hidden_size, width)
    return {
        **kept,
        **noisy,
        "moe.experts.down_weight": down,
        "moe.experts.norm_weight": statistics.inner_gain[neurons],
    }


def _ternary_layer(
    layer: dict[str, Tensor],
    config: ModelConfig,
    settings: UpcycleSettings,
    statistics: LayerStatistics,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Make attention and experts latent, the experts as copies, and calibrate the norms before the outputs."""
    new = {name: layer[name] for name in ("attention.norm.weight", "moe.norm.weight")}
    for name in _ATTENTION_PROJECTIONS:
        weight = layer[f"attention.{name}.weight"]
        new[f"attention.{name}.weight"] = weight if config.has_float_attention else _latent(weight, config)
    new["attention.o_proj.norm.weight"] = statistics.attention_gain
    for name in PROJECTIONS:
        copies = layer[f"{_SHARED}{name}_weight"].expand(config.num_experts, -1, -1)
        new[f"moe.experts.{name}_weight"] = _latent(_with_noise(copies, settings.noise, generator), config)
    new["moe.experts.norm_weight"] = statistics.inner_gain.expand(config.num_experts, -1)
    return new


def _latent(weight: Tensor, config: ModelConfig) -> Tensor:
    return fit_scale(weight, weight_levels(config)) if config.is_packable else weight


def _with_noise(weight: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise of ``noise`` times each matrix's standard deviation."""
    deviation = weight.square().mean((-2, -1), keepdim=True).sqrt()
    return weight + noise * deviation * torch.randn(weight.shape, generator=generator)


def _router(config: ModelConfig, hidden_mean: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a router that does not see the mean row: what all tokens share would send them all to one expert."""
    weight = torch.randn(config.num_experts, config.hidden_size, generator=generator) * _ROUTER_STD
    direction = hidden_mean / hidden_mean.norm().clamp_min(1e-12)
    return weight - torch.outer(weight @ direction, direction)
