"""The static linear maps between a head's keys or values and the numbers that are coded.

In: vectors ``x`` of a head, after RoPE. Out: ``y = (x - mean) @ encode_matrix``, whose channels a code with one scale a
token describes well, and back: ``x = y @ decode_matrix + mean``. A map is fixed for the life of a cache: shared pages
stay valid, and nothing is ever coded twice.

Codes of few bits come back too short. The map back is therefore the inverse times a little more (``unbiased``).

Attention never maps the many keys back. With ``q' = q @ decode_matrix.T`` a score is ``q' . y + q . mean``, and a
weighted sum of values is ``(sum p y) @ decode_matrix + (sum p) mean``: one small product a query.

Without calibration the map is an orthonormal matrix with entries of equal size, which spreads a few large channels over
all of them; it needs no data. ``calibration.py`` makes better ones.

Source: Ashkboos et al. 2024, arXiv:2404.00456, section 3 (rotation).
"""

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PlaneFrame:
    """The maps of one layer's keys, or of its values.

    Attributes:
        mean: float32 ``[num_kv_heads, head_dim]``.
        encode_matrix: float32 ``[num_kv_heads, head_dim, head_dim]``; rows are channels of x, columns of y.
        decode_matrix: its inverse, float32, rows lengthened by ``unbiased`` where that helps.
        segment_weights: float32 ``[num_kv_heads, num_segments]``: how much an error in y counts, by segment.
    """

    mean: Tensor
    encode_matrix: Tensor
    decode_matrix: Tensor
    segment_weights: Tensor

    @cached_property
    def query_matrix(self) -> Tensor:
        """The transpose of ``decode_matrix``, contiguous: ``query @ query_matrix`` meets y instead of x."""
        return self.decode_matrix.transpose(1, 2).contiguous()

    def encode(self, x: Tensor) -> Tensor:
        """Map ``[num_kv_heads, num_tokens, head_dim]`` float32 to y of the same shape: float64 sums, rounded once."""
        centred = x.double() - self.mean.double().unsqueeze(1)
        return (centred @ self.encode_matrix.double()).float()

    def decode(self, y: Tensor) -> Tensor:
        """Undo ``encode`` and coding; float32."""
        return (y.double() @ self.decode_matrix.double() + self.mean.double().unsqueeze(1)).float()

    def to(self, device: torch.device) -> "PlaneFrame":
        """Return the maps with contiguous tensors on a device; these ones if they are so already."""
        tensors = (self.mean, self.encode_matrix, self.decode_matrix, self.segment_weights)
        if all(x.device == device and x.dtype == torch.float32 and x.is_contiguous() for x in tensors):
            return self
        return PlaneFrame(*(x.to(device, torch.float32).contiguous() for x in tensors))


@dataclass(frozen=True, eq=False)
class LayerFrame:
    """The maps of one layer.

    Attributes:
        key: map of the keys.
        value: map of the values.
    """

    key: PlaneFrame
    value: PlaneFrame

    def to(self, device: torch.device) -> "LayerFrame":
        """Return the maps on a device; these ones if they are there already."""
        key, value = self.key.to(device), self.value.to(device)
        return self if key is self.key and value is self.value else LayerFrame(key, value)


def plain_frame(num_kv_heads: int, head_dim: int) -> PlaneFrame:
    """Return the map that needs no data: a rotation, the same for every head, around zero."""
    matrix = flat_orthonormal(head_dim).float().expand(num_kv_heads, head_dim, head_dim).contiguous()
    return PlaneFrame(
        mean=torch.zeros(num_kv_heads, head_dim),
        encode_matrix=matrix,
        decode_matrix=matrix.transpose(1, 2).contiguous(),
        segment_weights=torch.ones(num_kv_heads, 1),
    )


def unbiased(frame: PlaneFrame, kept_share: Tensor) -> PlaneFrame:
    """Lengthen what is read, so that on average over many tokens it is what was written.

    The nearest code of a vector is shorter than the vector: by 9 % at 2 bits, 0.7 % at 4. As an error of one token
    that is as small as errors get. But attention adds up tokens: their other errors cancel, this one does not, and
    scores of old tokens are all too flat. Lengthening adds the same few per cent to the errors of single tokens, and
    takes a third from the divergence of SmolLM2's logits at 2 bits (docs/experiments.md). For keys it needs a mean
    near that of the keys: lengthening around zero adds errors for a shift that softmax does not see.

    Args:
        frame: whose ``decode_matrix`` is the inverse of ``encode_matrix``.
        kept_share: float ``[head_dim]``, above 0: what codes keep of each channel of y (``trellis.KEPT_SHARE``).
    """
    return replace(frame, decode_matrix=(frame.decode_matrix / kept_share.unsqueeze(1)).float().contiguous())


@cache
def flat_orthonormal(size: int) -> Tensor:
    """Return an orthonormal float64 ``[size, size]`` matrix whose entries are all about ``1 / sqrt(size)``.

    Powers of two: the Walsh-Hadamard matrix. Otherwise the discrete Hartley transform (entries up to
    ``sqrt(2 / size)``). Rows have fixed random signs, so that smooth vectors do not collapse into one channel.
    """
    if size & (size - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < size:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    else:
        index = torch.arange(size, dtype=torch.float64)
        angle = 2 * math.pi * (torch.outer(index, index) % size) / size
        matrix = angle.cos() + angle.sin()
    return _signs(size)[:, None] * matrix / math.sqrt(size)


def _signs(size: int) -> Tensor:
    """Return ``[size]`` float64 of +1 and -1, the same on every machine and in every version.

    The sign of channel i is the top bit of i + 1 after two multiply-and-shift rounds modulo 2**32. The odd multipliers
    are 2**32 times the fractional parts of the golden ratio and of sqrt(2), made odd.
    """
    signs = []
    for channel in range(size):
        mixed = (channel + 1) * 0x9E3779B9 % 2**32
        mixed = (mixed ^ mixed >> 15) * 0x6A09E667 % 2**32
        signs.append(-1.0 if (mixed ^ mixed >> 13) >> 31 else 1.0)
    return torch.tensor(signs, dtype=torch.float64)
