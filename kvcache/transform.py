"""The rotation that spreads outlier channels before quantization: an orthonormal Walsh-Hadamard transform.

In: ``[..., head_dim]`` vectors, head_dim a power of two. Out: the same shape, same length of each vector, with the
energy of a few large channels shared among all. Scores are unchanged when query and key are rotated alike, and a
weighted sum of rotated values needs one inverse rotation per output.

The transform is ``x -> H (s * x) / sqrt(D)``, with H the Hadamard matrix in natural order and ``s`` fixed signs; the
signs keep smooth vectors (a constant one, say) from collapsing into a single channel. Signs and order of additions
are part of the page format: other backends must produce the same bits.

Source: Ashkboos et al. 2024, arXiv:2404.00456, section 3.
"""

from functools import cache

import torch
from torch import Tensor


def rotate(x: Tensor) -> Tensor:
    """Rotate vectors along their last axis.

    Args:
        x: ``[..., head_dim]`` float32, head_dim a power of two.

    Returns:
        ``[..., head_dim]`` float32, of the same Euclidean length along the last axis.
    """
    return _orthonormal_hadamard(x * _signs(x.shape[-1]))


def unrotate(x: Tensor) -> Tensor:
    """Undo ``rotate``, up to float32 rounding.

    Args:
        x: ``[..., head_dim]`` float32, head_dim a power of two.

    Returns:
        ``[..., head_dim]`` float32.
    """
    return _orthonormal_hadamard(x) * _signs(x.shape[-1])


def _orthonormal_hadamard(x: Tensor) -> Tensor:
    """Multiply by the Hadamard matrix and scale: sums and differences at distance 1, 2, 4, ... along the last axis."""
    shape = x.shape
    distance = 1
    while distance < shape[-1]:
        pairs = x.reshape(-1, shape[-1] // (2 * distance), 2, distance)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack((low + high, low - high), dim=2)
        distance *= 2
    normalization: float = shape[-1] ** -0.5
    return x.reshape(shape) * normalization


@cache
def _signs(head_dim: int) -> Tensor:
    """Return ``[head_dim]`` float32 of +1 and -1, the same on every machine and in every version.

    The sign of channel i is the top bit of i + 1 after two multiply-and-shift rounds modulo 2**32. The odd multipliers
    are 2**32 times the fractional parts of the golden ratio and of sqrt(2), made odd.
    """
    signs = []
    for channel in range(head_dim):
        mixed = (channel + 1) * 0x9E3779B9 % 2**32
        mixed = (mixed ^ mixed >> 15) * 0x6A09E667 % 2**32
        signs.append(-1.0 if (mixed ^ mixed >> 13) >> 31 else 1.0)
    return torch.tensor(signs)
