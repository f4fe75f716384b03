r"""Files of fragments: each worker writes its own, and any number of workers reads the runs that it needs.

A safetensors file. A tensor's name says where its run starts in the flattened global tensor, and the header's metadata
says how that tensor is shaped::

    "blocks.0.moe.experts.up_weight@98304": F32 [49152]
    __metadata__: {"shapes": "{\"blocks.0.moe.experts.up_weight\": [8, 256, 128], ...}"}
"""

import bisect
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from cluster.training.fragments import Fragment
from moe_bitnet.errors import CheckpointError

_SHAPES = "shapes"
_FLOAT_BYTES = 4
_ADVICE = "Delete that folder to use the checkpoint before."


def write_fragments(path: Path, fragments: Sequence[Fragment]) -> str:
    """Write runs to a file, and wait until they are on the disk; nothing but the runs themselves is in memory.

    Args:
        path: where to.
        fragments: flat float32 on the CPU, contiguous.
    Returns:
        SHA-256 of the file, taken on the way.
    Raises:
        OSError: the disk is full, or the place cannot be written.
    """
    shapes = {fragment.name: list(fragment.shape) for fragment in fragments}
    header: dict[str, Any] = {"__metadata__": {_SHAPES: json.dumps(shapes)}}
    end = 0
    for fragment in fragments:
        start, end = end, end + fragment.values.numel() * _FLOAT_BYTES
        key = f"{fragment.name}@{fragment.start}"
        header[key] = {"dtype": "F32", "shape": [fragment.values.numel()], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    digest = hashlib.sha256()
    parts: Iterable[bytes | memoryview] = (struct.pack("<Q", len(text)), text, *map(_bytes_of, fragments))
    with path.open("wb") as file:
        for data in parts:
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Run:
    start: int
    count: int
    file: Any
    key: str


class FragmentFiles:
    """Open files of fragments; only what is asked for is read.

    Args:
        paths: all files of one checkpoint.
    Raises:
        CheckpointError: a file is missing, damaged or no file of fragments.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._runs: dict[str, list[_Run]] = {}
        self._place = str(paths[0].parent) if paths else "the checkpoint"
        for path in paths:
            try:
                file: Any = safetensors.safe_open(str(path), framework="pt")
                self._add(path, file, json.loads((file.metadata() or {})[_SHAPES]))
            except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{path}: cannot be read as runs of tensors ({error!r}). {_ADVICE}") from error
        for runs in self._runs.values():
            runs.sort(key=lambda run: run.start)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Check, before anything is allocated, that the files hold every element of these tensors once, and no other.

        Args:
            expected: shapes of the global tensors by name.
        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape, or its runs overlap or leave a gap.
        """
        different = sorted(expected.keys() ^ self.shapes.keys())
        if different:
            kind = "missing" if different[0] in expected else "unknown"
            raise CheckpointError(
                f"{self._place}: the tensors do not fit the model; {different[0]} is {kind} ({len(different)} in all). "
                f"{_ADVICE}"
            )
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                raise CheckpointError(
                    f"{self._place}: {name} is {list(self.shapes[name])}, the model needs {list(shape)}. {_ADVICE}"
                )
            runs, end = self._runs[name], math.prod(shape)
            is_whole = runs[0].start == 0 and runs[-1].start + runs[-1].count == end
            if not is_whole or any(run.start + run.count != following.start for run, following in pairwise(runs)):
                raise CheckpointError(
                    f"{self._place}: the runs of {name} do not hold each of its {end} elements once. {_ADVICE}"
                )

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Read a run of a checked tensor, flat, float32; a :data:`~cluster.training.fragments.FragmentReader`.

        Raises:
            CheckpointError: there is no such tensor, or it has no such elements.
        """
        num_elements = math.prod(self.shapes.get(name, (0,)))
        if name not in self.shapes or start < 0 or count < 0 or start + count > num_elements:
            raise CheckpointError(
                f"{self._place}: elements {start} to {start + count} of {name} were asked for, it has {num_elements}. "
                f"The checkpoint and the run belong to different models."
            )
        values = torch.empty(count, dtype=torch.float32)
        runs = self._runs[name]
        first = max(bisect.bisect_right(runs, start, key=lambda run: run.start) - 1, 0)
        for run in runs[first:]:
            low, high = max(start, run.start), min(start + count, run.start + run.count)
            if run.start >= start + count:
                break
            if low < high:
                values[low - start : high - start] = run.file.get_slice(run.key)[low - run.start : high - run.start]
        return values

    def _add(self, path: Path, file: Any, shapes: dict[str, list[int]]) -> None:
        for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            name, _, start = key.rpartition("@")
            part = file.get_slice(key)
            shape = tuple(int(size) for size in shapes[name])
            if part.get_dtype() != "F32" or len(part.get_shape()) != 1 or self.shapes.setdefault(name, shape) != shape:
                raise ValueError(f"{key} is {part.get_dtype()} {part.get_shape()}, {name} is {list(shape)}")
            self._runs.setdefault(name, []).append(_Run(int(start), part.get_shape()[0], file, key))


def _bytes_of(fragment: Fragment) -> memoryview:
    values = fragment.values
    assert values.dtype == torch.float32
    assert values.device.type == "cpu"
    return values.contiguous().view(torch.uint8).numpy().data
