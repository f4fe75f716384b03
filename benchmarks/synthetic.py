"""Packed models with random ternary weights, built layer by layer: no layer is ever held in float.

Speed and memory do not depend on what the weights are; quality is measured elsewhere.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.peers.shape import SyntheticShape
from moe_bitnet.checkpoint.pack import packed_skeleton
from moe_bitnet.config import ModelConfig
from moe_bitnet.model import MoETransformer
from moe_bitnet.packed_module import PackedModule
from moe_bitnet.packing import Layout

MIXTRAL_8X7B = ModelConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    num_experts=8,
    top_k=2,
    has_tied_embeddings=False,
)
"""Mixtral-8x7B (arXiv:2401.04088): 46.7B parameters, 12.9B active."""

PAPER_3B = SyntheticShape(
    num_layers=26,
    hidden_size=3200,
    intermediate_size=8640,
    num_heads=32,
    num_kv_heads=32,
    head_dim=100,
    vocab_size=32_000,
)
"""The 3B model of arXiv:2402.17764, with the vocabulary of LLaMA."""

_BITS_OF_TRITS = torch.tensor(
    [sum((byte // 3**i % 3) << (2 * i) for i in range(4)) for byte in range(81)], dtype=torch.uint8
)


def dense_config(shape: SyntheticShape) -> ModelConfig:
    """Return a dense model's shape as a mixture of one expert."""
    return ModelConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        has_tied_embeddings=False,
    )


def random_packed(shape: torch.Size, layout: Layout, generator: torch.Generator) -> Tensor:
    """Draw portable bytes ``shape`` whose weights -1, 0 and 1 are equally likely."""
    if layout == "base3":
        return torch.randint(0, 243, shape, dtype=torch.uint8, generator=generator)
    packed = torch.randint(0, 81, shape, dtype=torch.uint8, generator=generator)
    for rows in packed.view(-1, shape[-1]).split(4096):  # in parts, since an index takes four bytes
        rows.copy_(_BITS_OF_TRITS[rows.int()])
    return packed


def build_packed_model(
    config: ModelConfig,
    layout: Layout,
    float_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    on_module: Callable[[int, int], None] | None = None,
) -> MoETransformer:
    """Build a packed model with random weights.

    Args:
        config: the shape.
        layout: bits a weight.
        float_dtype: of the embedding and the head; norms and routers are float32.
        seed: of the weights.
        on_module: called with (modules done, modules in all).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = MoETransformer(config)
    packed_skeleton(model, layout)
    modules = [module for module in model.modules() if isinstance(module, PackedModule)]
    for index, module in enumerate(modules):
        for name, size in module.matrix_sizes.items():
            packed_shape = module.get_buffer(f"{name}_packed").shape
            scale = torch.full((*packed_shape[:-2], 1, 1), (size.in_features * 2 / 3) ** -0.5)
            module.set_matrix(name, random_packed(packed_shape, layout, generator), scale)
        module.arrange_weights()
        if on_module is not None:
            on_module(index + 1, len(modules))
    for module in model.modules():
        _draw_floats(module, config, float_dtype, generator)
    return model.eval()


def _draw_floats(module: nn.Module, config: ModelConfig, dtype: torch.dtype, generator: torch.Generator) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        is_table = parameter.shape == (config.vocab_size, config.hidden_size)
        is_router = parameter.dim() == 2 and name == "weight" and not is_table
        values = torch.ones(parameter.shape, dtype=dtype if is_table else torch.float32)
        if is_table or is_router:
            values.normal_(std=config.hidden_size**-0.5, generator=generator)
        module.register_parameter(name, nn.Parameter(values, requires_grad=False))
