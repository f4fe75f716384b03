"""The shape of a model: one frozen, flat dataclass, checked once.

A dense model is a mixture with one expert (``num_experts=1, top_k=1``). The
FP16/FP32 twin of a ternary model differs in ``precision`` alone.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from moe_bitnet.errors import ConfigError
from moe_bitnet.files import read_json

Precision = Literal["ternary", "float", "int4-experts", "binary"]
StraightThrough = Literal["identity", "clipped", "relu"]
NormRecipe = Literal["sub_norm", "inner_norm"]
Activation = Literal["swiglu", "squared_relu"]

MAX_LAYERS = 10_000
MAX_WEIGHTS = 2**48
"""Beyond any model there is; a damaged config is refused before its sizes overflow."""

_OPTIONAL_SIZES = ("num_shared_experts", "head_dim", "shared_intermediate_size")
_CHOICES: dict[str, tuple[str, ...]] = {
    "precision": get_args(Precision),
    "straight_through": get_args(StraightThrough),
    "norm_recipe": ("sub_norm", "inner_norm"),
    "activation": ("swiglu", "squared_relu"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and recipes of a :class:`moe_bitnet.MoETransformer`.

    Attributes:
        vocab_size: V, rows of the embedding and of the head.
        hidden_size: H, width of the residual stream.
        intermediate_size: F, inner width of one expert.
        num_layers: L, transformer blocks; every block holds a MoE layer.
        num_heads: N, query heads.
        num_kv_heads: key/value heads; divides ``num_heads`` (grouped-query attention).
        num_experts: E, routed experts in a layer; 1 gives a dense model.
        top_k: K, experts that each token visits.
        num_shared_experts: experts of width F that every token visits, beside the routed ones.
        head_dim: D, width of one head; 0 means ``hidden_size // num_heads``.
        max_seq_len: tokens of the longest sequence seen in training.
        precision: of attention and experts: ``"ternary"`` (BitNet b1.58, weights in {-1, 0, 1}), ``"binary"``
            (BitNet b1, weights in {-1, 1}), both with int8 activations; ``"int4-experts"`` (experts in groups of 4-bit
            weights, all else float); ``"float"`` (the twin).
        straight_through: which gradient passes the rounding of activations in training: ``"identity"`` all of it,
            ``"clipped"`` none where a value is at the end of the int8 range, ``"relu"`` that of positive values alone.
        has_float_backbone: attention and shared experts stay float and have no norms within, as in a dense
            model that experts were added to (MoTE, arXiv:2506.14435); ``precision`` is that of the routed experts.
        shared_intermediate_size: inner width of a shared expert; 0 means ``intermediate_size``.
        norm_recipe: ``"sub_norm"`` (BitNet b1.58 2B4T: two pre-norms in a block, and a norm
            before each output projection) or ``"inner_norm"`` (b1.58 FAQ: query, key and value
            have a norm each). The norm before the experts is one for the layer in both (docs/decisions/0001).
        activation: ``"swiglu"`` or ``"squared_relu"`` (a gated linear unit with squared ReLU).
        rope_theta: base of the rotary embedding.
        norm_eps: added to the mean square in RMSNorm.
        has_tied_embeddings: the head reuses the embedding's weight.

    Raises:
        ConfigError: sizes are impossible; the message names them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_experts: int = 1
    top_k: int = 1
    num_shared_experts: int = 0
    head_dim: int = 0
    max_seq_len: int = 1024
    precision: Precision = "ternary"
    norm_recipe: NormRecipe = "sub_norm"
    activation: Activation = "swiglu"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    has_tied_embeddings: bool = True
    straight_through: StraightThrough = "identity"
    has_float_backbone: bool = False
    shared_intermediate_size: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        if self.head_dim == 0:
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"ModelConfig: hidden_size {self.hidden_size} is not a multiple of num_heads "
                    f"{self.num_heads}. Change one of them, or give head_dim."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.head_dim % 2:
            raise ConfigError(
                f"ModelConfig: head_dim is {self.head_dim}; rotary embedding needs an even number. "
                f"Change hidden_size or num_heads, or give head_dim."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"ModelConfig: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}. "
                f"Use a divisor of {self.num_heads}."
            )
        if self.shared_intermediate_size == 0:
            object.__setattr__(self, "shared_intermediate_size", self.intermediate_size)
        attention_width = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        expert_weights = (
            self.num_experts * self.expert_parameters + self.num_shared_experts * self.shared_expert_parameters
        )
        layer_weights = expert_weights + (attention_width + self.num_experts) * self.hidden_size
        num_weights = self.num_layers * layer_weights + 2 * self.vocab_size * self.hidden_size
        if self.num_layers > MAX_LAYERS or num_weights > MAX_WEIGHTS:
            raise ConfigError(
                f"ModelConfig: {self.num_layers} layers and {num_weights} weights are too many; allowed are "
                f"{MAX_LAYERS} layers and {MAX_WEIGHTS} weights. Check the sizes."
            )
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"ModelConfig: top_k {self.top_k} exceeds num_experts {self.num_experts}. "
                f"Use 1 <= top_k <= {self.num_experts}."
            )

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _CHOICES:
                if value not in _CHOICES[field.name]:
                    raise ConfigError(
                        f"ModelConfig: {field.name} is {value!r}; allowed are {', '.join(_CHOICES[field.name])}."
                    )
            elif field.type is bool:
                if not isinstance(value, bool):
                    raise ConfigError(f"ModelConfig: {field.name} is {value!r}; give true or false.")
            elif field.type is float:
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                    raise ConfigError(f"ModelConfig: {field.name} is {value!r}; give a positive number.")
            else:
                smallest = 0 if field.name in _OPTIONAL_SIZES else 1
                if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                    raise ConfigError(
                        f"ModelConfig: {field.name} is {value!r}; give an integer of at least {smallest}."
                    )

    @property
    def is_packable(self) -> bool:
        """Whether routed experts hold weights in {-1, 0, 1} and take int8 rows: ternary, and binary without the 0."""
        return self.precision in ("ternary", "binary")

    @property
    def has_float_attention(self) -> bool:
        """Whether attention projections are float."""
        return self.has_float_backbone or not self.is_packable

    @property
    def expert_parameters(self) -> int:
        """Weights of one routed expert: gate, up and down projections and the norm before down."""
        return 3 * self.hidden_size * self.intermediate_size + self.intermediate_size

    @property
    def shared_expert_parameters(self) -> int:
        """Weights of one shared expert, counted alike; without the norm if the backbone is float."""
        width = self.shared_intermediate_size
        return 3 * self.hidden_size * width + (0 if self.has_float_backbone else width)

    def replace(self, **changes: Any) -> "ModelConfig":
        """Return a copy with ``changes``, checked anew."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any, source: str = "config") -> "ModelConfig":
        """Build a config from parsed JSON.

        Args:
            values: the parsed JSON value; must be an object with the fields of this class.
            source: what to call the input in an error, such as a file name.
        Raises:
            ConfigError: not an object, unknown or missing fields, or impossible sizes.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: expected a JSON object with model sizes, found {type(values).__name__}.")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"{source}: unknown fields {', '.join(unknown)}. Allowed are {', '.join(sorted(known))}.")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"{source}: {error}. All sizes without a default must be given.") from error
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error

    @classmethod
    def from_json(cls, path: Path) -> "ModelConfig":
        """Read a config from a JSON file.

        Raises:
            ConfigError: the file cannot be read, is not JSON, or holds impossible sizes.
        """
        try:
            values = read_json(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as JSON ({error}). Give a model config file.") from error
        return cls.from_dict(values, source=str(path))
