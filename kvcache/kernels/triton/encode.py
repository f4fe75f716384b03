"""From a page to the launches of its encoder; for keys and for values: map, trials, choice of scales, codes.

Launches follow from the format alone; nothing waits for the GPU. One layer of one page is little work for a GPU: a
program codes 32 rows of a head, one element after the other, and few programs are needed. Known limit: a long prompt,
which seals many pages at once, would gain from a launch for all of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcache.frame import LayerFrame, PlaneFrame
from kvcache.kernels.triton.frame_map import map_kernel
from kvcache.kernels.triton.layout import key_segments, padded_head_dim
from kvcache.kernels.triton.tables import covered_table, level_table, scale_steps, scale_table
from kvcache.kernels.triton.trials import choose_kernel, key_trial_kernel, value_trial_kernel
from kvcache.kernels.triton.writer import write_kernel
from kvcache.page import FP16_BYTES, PAGE_SIZE, LayerFormat, PlaneFormat

ROWS = 32
"""Rows of a program, as in ``viterbi.py``: one a thread of its single warp."""
MAX_STATES = 32
TOKENS_PER_MAP = 16


@dataclass(frozen=True)
class Trials:
    """A plane in its frame, and the scales to try.

    Attributes:
        y: float32, see ``frame_map.map_kernel``.
        codes: int32 ``[trials, num_kv_heads, 64]``.
        scales: float32, like ``codes``.
    """

    y: Tensor
    codes: Tensor
    scales: Tensor


def launch_encode(layer_format: LayerFormat, frame: LayerFrame, exact: Tensor, packed: Tensor) -> None:
    """Encode; arguments as those of the operation, contiguous and on one device."""
    heads = packed.view(layer_format.num_kv_heads, layer_format.head_bytes)
    key_bytes = layer_format.key.plane_bytes
    with torch.cuda.device_of(packed):
        _encode_plane(layer_format.key, frame.key, exact, heads[:, :key_bytes], is_key=True)
        _encode_plane(layer_format.value, frame.value, exact, heads[:, key_bytes:], is_key=False)


def _encode_plane(plane: PlaneFormat, frame: PlaneFrame, exact: Tensor, planes: Tensor, *, is_key: bool) -> None:
    """Encode the keys or values of all heads into uint8 ``[num_kv_heads, plane_bytes]``, which may have strides."""
    if plane.num_bits == 16:
        exact_bytes = PAGE_SIZE * plane.head_dim * FP16_BYTES
        planes.copy_(exact.view(len(planes), 2, exact_bytes)[:, 0 if is_key else 1])
        return
    is_plain = all(segment.num_bits == 8 for segment in plane.segments)
    trials = _map(plane, frame, exact, len(planes), is_key=is_key, is_plain=is_plain)
    errors = trials.scales
    if not is_plain:
        errors = _key_errors(plane, frame, trials) if is_key else _value_errors(plane, trials)
    chosen = _choose(plane, trials, errors, planes)
    _write(plane, trials, chosen, planes, is_key=is_key)


def _map(
    plane: PlaneFormat, frame: PlaneFrame, exact: Tensor, num_kv_heads: int, *, is_key: bool, is_plain: bool
) -> Trials:
    device = exact.device
    steps = scale_steps(device)
    num_trials = 1 if is_plain else len(steps)
    trials = Trials(
        y=torch.empty(num_kv_heads * PAGE_SIZE * plane.head_dim, dtype=torch.float32, device=device),
        codes=torch.empty((num_trials, num_kv_heads, PAGE_SIZE), dtype=torch.int32, device=device),
        scales=torch.empty((num_trials, num_kv_heads, PAGE_SIZE), dtype=torch.float32, device=device),
    )
    map_kernel[(PAGE_SIZE // TOKENS_PER_MAP, num_kv_heads)](
        exact.view(torch.float16),
        frame.encode_matrix,
        frame.mean,
        scale_table(device),
        covered_table(device),
        steps,
        trials.y,
        trials.codes,
        trials.scales,
        num_kv_heads,
        HEAD_DIM=plane.head_dim,
        PADDED=padded_head_dim(plane.head_dim),
        NUM_TRIALS=num_trials,
        IS_KEY=is_key,
        IS_PLAIN=is_plain,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return trials


def _key_errors(plane: PlaneFormat, frame: PlaneFrame, trials: Trials) -> Tensor:
    num_trials, num_kv_heads, _ = trials.scales.shape
    errors = torch.empty_like(trials.scales)
    key_trial_kernel[(PAGE_SIZE // ROWS, num_kv_heads, num_trials)](
        trials.y,
        trials.scales,
        frame.segment_weights,
        level_table(errors.device),
        errors,
        num_kv_heads,
        HEAD_DIM=plane.head_dim,
        KEY_SEGMENTS=_segments(plane, is_key=True),
        num_warps=1,
        enable_fp_fusion=False,
    )
    return errors


def _value_errors(plane: PlaneFormat, trials: Trials) -> Tensor:
    num_trials, num_kv_heads, _ = trials.scales.shape
    grid = (-(-plane.head_dim // ROWS), num_kv_heads, num_trials)
    device = trials.y.device
    errors = torch.empty((num_trials, num_kv_heads, plane.head_dim, PAGE_SIZE), dtype=torch.float32, device=device)
    survivor_bytes = PAGE_SIZE * (64 >> plane.num_bits) * ROWS
    value_trial_kernel[grid](
        trials.y,
        trials.scales,
        level_table(device),
        torch.empty(grid[0] * grid[1] * grid[2] * survivor_bytes, dtype=torch.uint8, device=device),
        errors,
        num_kv_heads,
        HEAD_DIM=plane.head_dim,
        BITS=plane.num_bits,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return errors


def _choose(plane: PlaneFormat, trials: Trials, errors: Tensor, planes: Tensor) -> Tensor:
    num_trials, num_kv_heads, _ = trials.scales.shape
    chosen = torch.empty((num_kv_heads, PAGE_SIZE), dtype=torch.float32, device=planes.device)
    choose_kernel[(num_kv_heads,)](
        errors,
        trials.codes,
        trials.scales,
        planes[:, plane.code_bytes :],
        chosen,
        num_kv_heads,
        planes.stride(0),
        NUM_TRIALS=num_trials,
        NUM_ERRORS=errors.numel() // trials.scales.numel(),
        num_warps=2,
        enable_fp_fusion=False,
    )
    return chosen


def _write(plane: PlaneFormat, trials: Trials, chosen: Tensor, planes: Tensor, *, is_key: bool) -> None:
    num_rows, num_elements = (PAGE_SIZE, plane.head_dim) if is_key else (plane.head_dim, PAGE_SIZE)
    grid = (-(-num_rows // ROWS), len(planes))
    device = planes.device
    survivor_bytes = num_elements * MAX_STATES * ROWS
    segments = _segments(plane, is_key=is_key)
    write_kernel[grid](
        trials.y,
        chosen,
        torch.empty(grid[0] * grid[1] * survivor_bytes, dtype=torch.uint8, device=device),
        level_table(device),
        planes[:, : plane.code_bytes].view(torch.int32),
        planes.stride(0) // 4,
        NUM_ROWS=num_rows,
        NUM_ELEMENTS=num_elements,
        WORDS_PER_LANE=sum(segment.num_words for segment in plane.segments),
        SEGMENTS=segments,
        IS_KEY=is_key,
        num_warps=1,
        enable_fp_fusion=False,
    )


def _segments(plane: PlaneFormat, *, is_key: bool) -> tuple[tuple[int, ...], ...]:
    """Lay out the segments of a lane; a lane of values has 64 tokens in one segment, described like a key's."""
    if is_key:
        return tuple(tuple(segment) for segment in key_segments(plane))
    return ((PAGE_SIZE, plane.num_bits, PAGE_SIZE, 0, 0, 0),)
