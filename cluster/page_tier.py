"""A tier in Ray's object store: cold pages of a KV cache leave its memory, and come back bit for bit.

A record is one object, a uint8 array of all its pages. The store keeps it in shared memory, and moves it to disk when
that runs full. References, metadata and checksums stay with the process that wrote the pages: handles end with it, or
with the Ray it was connected to. For pages that outlive the process there is ``kvcache.page_file``.
"""

import json
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import ray.exceptions
import torch
from torch import Tensor

from moe_bitnet.errors import CacheFullError, ClusterError, DataError, ShapeError


@dataclass(frozen=True)
class _Record:
    """What stays here of pages in the store.

    Attributes:
        reference: of the object; the store keeps it as long as this lives.
        shape: pages, and bytes of a page.
        checksums: CRC32 of each page.
        metadata: as JSON text.
    """

    reference: Any
    shape: tuple[int, int]
    checksums: tuple[int, ...]
    metadata: str


class RayPageTier:
    """Keeps pages in the object store of the Ray that is connected already.

    Args:
        timeout_s: seconds that ``read`` waits for an object that has to come from disk or another node.

    Raises:
        ClusterError: Ray is not connected.
    """

    def __init__(self, timeout_s: float = 60.0) -> None:
        self.timeout_s = timeout_s
        self._records: dict[str, _Record] = {}
        self._connection = _connection()

    @property
    def handles(self) -> list[str]:
        """Handles of all records, oldest first."""
        return list(self._records)

    def write(self, pages: Tensor, metadata: dict[str, Any]) -> str:
        """Put pages into the store.

        Args:
            pages: uint8 ``[num_pages, page_bytes]`` on any device.
            metadata: values that JSON gives back as they were: no tuples, and no NaN.
        Returns:
            The handle, valid until the record is dropped or this tier is closed.
        Raises:
            ShapeError: the pages have another shape or dtype.
            DataError: the metadata is not JSON.
            CacheFullError: neither the store nor its disk has room.
            ClusterError: Ray is not connected, or was started anew since.
        """
        self._check_connection()
        if pages.dtype != torch.uint8 or pages.dim() != 2:
            raise ShapeError(
                f"Ray page tier: the pages are {pages.dtype} {list(pages.shape)}; pass torch.uint8 [num_pages, "
                f"page_bytes]."
            )
        text = _encode_metadata(metadata)
        array = pages.cpu().contiguous().numpy()
        with _translated_errors("the pages were not taken"):
            reference = ray.put(array)
        handle = secrets.token_hex(8)
        self._records[handle] = _Record(reference, array.shape, _checksums(array), text)
        return handle

    def read(self, handle: str) -> tuple[Tensor, dict[str, Any]]:
        """Return the pages, uint8 ``[num_pages, page_bytes]`` on the CPU, and the metadata of a record.

        Raises:
            DataError: there is no such record, or its pages have changed.
            ClusterError: the object is lost or does not come in time, or Ray is not connected any more.
        """
        self._check_connection()
        record = self._record(handle)
        with _translated_errors(f"record {handle} is lost"):
            found = ray.get(record.reference, timeout=self.timeout_s)
        array = np.array(found)  # the store's own memory is read only and shared
        if array.dtype != np.uint8 or array.shape != record.shape:
            raise _damaged(handle, f"it is {array.dtype} {list(array.shape)} instead of uint8 {list(record.shape)}")
        for index, (found_checksum, checksum) in enumerate(zip(_checksums(array), record.checksums, strict=True)):
            if found_checksum != checksum:
                raise _damaged(handle, f"page {index} does not match its checksum")
        return torch.from_numpy(array), json.loads(record.metadata)

    def drop(self, handle: str) -> None:
        """Forget a record; the store frees its object soon after.

        Raises:
            DataError: there is no such record.
        """
        self._record(handle)
        del self._records[handle]

    def close(self) -> None:
        """Forget all records."""
        self._records.clear()

    def __enter__(self) -> "RayPageTier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, handle: str) -> _Record:
        if handle not in self._records:
            raise DataError(
                f"Ray page tier: there is no record {handle!r}; {len(self._records)} are held. Was it dropped, or "
                f"written by another process?"
            )
        return self._records[handle]

    def _check_connection(self) -> None:
        if _connection() != self._connection:
            raise ClusterError(
                "Ray page tier: Ray was shut down and started again, and the pages went with it. Make a new tier, and "
                "compute the sequences again."
            )


def _connection() -> tuple[str, str]:
    """Return what tells this connection to Ray from an earlier one: a cluster numbers its jobs, each from 1 on."""
    if not ray.is_initialized():  # else Ray would start a cluster of its own accord
        raise ClusterError(
            "Ray page tier: Ray is not connected. Use it inside 'with cluster.connect(...)', or after ray.init()."
        )
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id()


def _encode_metadata(metadata: dict[str, Any]) -> str:
    try:
        text = json.dumps(metadata, allow_nan=False)
        is_kept = isinstance(metadata, dict) and json.loads(text) == metadata
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"Ray page tier: the metadata is not JSON ({error}). Use text, numbers and lists.") from error
    if not is_kept:
        raise DataError("Ray page tier: JSON would change the metadata. Use a dict with text keys, lists for tuples.")
    return text


def _checksums(pages: npt.NDArray[np.uint8]) -> tuple[int, ...]:
    return tuple(zlib.crc32(page) for page in pages)


def _damaged(handle: str, reason: str) -> DataError:
    return DataError(f"Ray page tier: record {handle} is damaged: {reason}. Drop it and compute the sequence again.")


@contextmanager
def _translated_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
        raise CacheFullError(
            f"Ray page tier: {what}: the object store and its disk are full. Drop sequences, or start Ray with a "
            f"larger object store."
        ) from error
    except ray.exceptions.GetTimeoutError as error:
        raise ClusterError(f"Ray page tier: {what} or late: {error}. Raise timeout_s, or look at the nodes.") from error
    except ray.exceptions.RayError as error:  # the object, its owner or its node is gone
        raise ClusterError(
            f"Ray page tier: {what} ({error}). Drop the record and compute the sequence again."
        ) from error
