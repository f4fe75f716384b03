"""Levels and scales as tensors on the device, made once a device."""

from functools import cache

import torch
from torch import Tensor

from kvcache.codec import SCALE_STEPS
from kvcache.scale import scales
from kvcache.trellis import LARGEST_LEVEL, all_levels


@cache
def level_table(device: torch.device) -> Tensor:
    """Return int8 ``[192]``, see :func:`kvcache.trellis.all_levels`."""
    return all_levels().to(device)


@cache
def scale_table(device: torch.device) -> Tensor:
    """Return float32 ``[256]``, the scale of every code."""
    return scales().to(device)


@cache
def covered_table(device: torch.device) -> Tensor:
    """Return float32 ``[256]``: the largest number that a plain 8-bit plane holds with every scale."""
    return (scales() * LARGEST_LEVEL).to(device)


@cache
def scale_steps(device: torch.device) -> Tensor:
    """Return int32 ``[trials]``: distances of the tried scales from the Gaussian one."""
    return torch.tensor(SCALE_STEPS, dtype=torch.int32).to(device)
