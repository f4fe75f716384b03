"""The float steps between integer products, as inference computes them on every CPU backend.

They are written so that their float32 results do not depend on the order of a sum, on an approximation of exp or on
an element's place in a vector: an int8 value after them is the same everywhere. Training computes the same formulas
faster, in float32 throughout.
"""

import torch
from torch import Tensor

from moe_bitnet.config import Activation


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Divide each row by the root of its mean square.

    The factor is computed in float64 and rounded once (torch's float32 square root is not correctly rounded on every
    machine); the product with it is float32.

    Args:
        x: ``[..., features]``, float; computed from float32.
        eps: added to the mean square.
    Returns:
        ``[..., features]`` float32.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    x = x.float()
    mean_square = x.double().square().mean(dim=-1, keepdim=True)
    return x * (1 / (mean_square + eps).sqrt()).float()


def gated_activation(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return ``silu(gate) · up`` (SwiGLU, arXiv:2002.05202) or ``relu(gate)² · up`` (2B4T).

    The sigmoid is computed in float64 and rounded once.

    Args:
        gate: float32 ``[..., F]``.
        up: float32 ``[..., F]``.
        activation: ``"swiglu"`` or ``"squared_relu"``.
    Returns:
        float32 ``[..., F]``.
    """
    if activation == "squared_relu":
        return gate.clamp_min(0).square() * up
    sigmoid = (1 / (1 + torch.exp(-gate.double()))).float()
    return gate * sigmoid * up
