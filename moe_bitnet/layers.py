"""Two small layers that everything else stands on: RMSNorm and rotary position embedding."""

import torch
from torch import Tensor, nn

from moe_bitnet import inference_math


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Divide each row by the root of its mean square.

    Args:
        x: ``[..., features]``, any float dtype; computed in float32.
        eps: added to the mean square.
    Returns:
        ``[..., features]`` float32.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if not torch.is_grad_enabled():
        return inference_math.rms_norm(x, eps)
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """RMSNorm with a learned gain for each feature.

    Args:
        num_features: length of a row.
        eps: added to the mean square.
    """

    def __init__(self, num_features: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the rows of ``x`` ``[..., num_features]``; returns float32."""
        return rms_norm(x, self.eps) * self.weight


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines that rotate a head at each position.

    Args:
        positions: int64 ``[T]``.
        head_dim: D, even.
        theta: base of the frequencies.
    Returns:
        two float32 tensors ``[T, 1, D / 2]``.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None] * theta**-exponents
    return angles.cos()[:, None, :], angles.sin()[:, None, :]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate feature i with feature i + D/2 of each head by its position's angle.

    Args:
        x: ``[..., T, N, D]``.
        cos: from :func:`rotary_tables`.
        sin: from :func:`rotary_tables`.
    Returns:
        ``[..., T, N, D]`` float32.
    Source: Su et al. 2021, arXiv:2104.09864, in the half-split order of Hugging Face's LLaMA.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
