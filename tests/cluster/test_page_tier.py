import time
from dataclasses import replace

import numpy as np
import pytest
import ray
import ray.exceptions
import torch

from cluster.config import ClusterConfig
from cluster.page_tier import RayPageTier
from cluster.runtime import connect
from moe_bitnet.errors import CacheFullError, ClusterError, DataError, ShapeError

pytestmark = pytest.mark.ray

METADATA = {"length": 7, "ends": [1, 2], "name": "ä"}


@pytest.fixture(scope="module")
def connection():
    with connect(ClusterConfig(num_cpus=1)):
        yield


@pytest.fixture
def tier(connection):
    with RayPageTier() as tier:
        yield tier


def random_pages(num_pages, page_bytes=100):
    return torch.randint(0, 256, (num_pages, page_bytes), dtype=torch.uint8)


def raise_error(error):
    def call(*_, **__):
        raise error

    return call


def referenced_ids():
    """Ids of the objects that this process keeps alive."""
    return set(map(bytes.decode, ray._private.worker.global_worker.core_worker.get_all_reference_counts()))


def test_without_ray_it_says_so_and_starts_none():
    assert not ray.is_initialized()
    with pytest.raises(ClusterError, match=r"Ray is not connected. Use it inside 'with cluster.connect"):
        RayPageTier()
    assert not ray.is_initialized()


@pytest.mark.parametrize(("num_pages", "page_bytes"), [(0, 64), (1, 1), (7, 100), (33, 2**16)])
def test_pages_and_metadata_come_back_as_they_were(tier, num_pages, page_bytes):
    pages = random_pages(num_pages, page_bytes)
    handle = tier.write(pages.T.contiguous().T, METADATA)
    for _ in range(2):  # the handle stays valid
        found, metadata = tier.read(handle)
        assert found.dtype == torch.uint8
        assert torch.equal(found, pages)
        assert metadata == METADATA
        found.zero_()  # the caller's own


def test_later_changes_of_the_callers_pages_and_metadata_do_not_matter(tier):
    for num_pages in (2, 5000):  # inside the message, and in the store
        pages, metadata = random_pages(num_pages), {"ends": [1]}
        expected = pages.clone()
        handle = tier.write(pages, metadata)
        pages.zero_()
        metadata["ends"].append(2)
        found = tier.read(handle)
        assert torch.equal(found[0], expected)
        assert found[1] == {"ends": [1]}


def test_a_dropped_record_is_gone_and_its_object_freed(tier):
    handle = tier.write(random_pages(5000), METADATA)
    object_id = tier._records[handle].reference.hex()
    assert object_id in referenced_ids()
    kept = tier.write(random_pages(1), METADATA)
    tier.drop(handle)
    assert tier.handles == [kept]
    assert object_id not in referenced_ids()
    for call in (tier.read, tier.drop):
        with pytest.raises(DataError, match=f"no record '{handle}'; 1 are held"):
            call(handle)


def test_closing_forgets_all(tier):
    handle = tier.write(random_pages(1), METADATA)
    tier.close()
    with pytest.raises(DataError, match="no record"):
        tier.read(handle)


@pytest.mark.parametrize("metadata", [{"a": float("nan")}, {"a": (1, 2)}, {1: "a"}, {"a": {1}}, [1]])
def test_metadata_that_json_would_change_is_refused(tier, metadata):
    with pytest.raises(DataError, match="JSON"):
        tier.write(random_pages(1), metadata)
    assert tier.handles == []


@pytest.mark.parametrize("pages", [torch.zeros(2, 8), torch.zeros(8, dtype=torch.uint8)])
def test_pages_of_another_shape_are_refused(tier, pages):
    with pytest.raises(ShapeError, match=r"pass torch.uint8 \[num_pages, page_bytes\]"):
        tier.write(pages, METADATA)


@pytest.mark.parametrize("place", [0, 199, 350])
def test_a_flipped_bit_is_found_and_its_page_named(tier, monkeypatch, place):
    pages = random_pages(4)
    handle = tier.write(pages, METADATA)
    changed = pages.numpy().copy()
    changed.reshape(-1)[place] ^= 16
    monkeypatch.setattr(ray, "get", lambda *_, **__: changed)
    with pytest.raises(DataError, match=f"record {handle} is damaged: page {place // 100} does not match"):
        tier.read(handle)


@pytest.mark.parametrize("found", [np.zeros((3, 100), np.uint8), np.zeros((4, 100), np.int8), b"", None])
def test_an_object_of_another_shape_is_damage(tier, monkeypatch, found):
    handle = tier.write(random_pages(4), METADATA)
    monkeypatch.setattr(ray, "get", lambda *_, **__: found)
    with pytest.raises(DataError, match="is damaged: it is"):
        tier.read(handle)


def read_for(tier, handle, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        tier.read(handle)
        time.sleep(0.05)


@ray.remote(num_cpus=0)
class Owner:
    def put(self, array):
        return [ray.put(array)]


def test_a_lost_object_is_an_error_that_names_the_record(tier):
    """An object is lost with the process that owns it: here another one, which ends."""
    pages = random_pages(5000)
    handle = tier.write(pages, METADATA)
    owner = Owner.remote()
    (reference,) = ray.get(owner.put.remote(pages.numpy()), timeout=60)
    tier._records[handle] = replace(tier._records[handle], reference=reference)
    assert torch.equal(tier.read(handle)[0], pages)
    ray.kill(owner)
    with pytest.raises(ClusterError, match=f"(?s)record {handle} is lost .*Drop the record"):
        read_for(tier, handle, seconds=30)  # Ray needs a moment to notice


def test_an_object_that_does_not_come_in_time_is_an_error(tier, monkeypatch):
    handle = tier.write(random_pages(1), METADATA)
    monkeypatch.setattr(ray, "get", raise_error(ray.exceptions.GetTimeoutError("60 s are over")))
    with pytest.raises(ClusterError, match=r"60 s are over. Raise timeout_s"):
        tier.read(handle)


@pytest.mark.parametrize("error", [ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError])
def test_a_full_store_is_a_full_cache(tier, monkeypatch, error):
    monkeypatch.setattr(ray, "put", raise_error(error("full")))
    with pytest.raises(CacheFullError, match=r"the object store and its disk are full. Drop sequences"):
        tier.write(random_pages(1), METADATA)
    assert tier.handles == []


def test_pages_are_gone_with_the_ray_that_held_them(connection):
    """The last test of all: the connection ends here."""
    tier = RayPageTier()
    handle = tier.write(random_pages(5000), METADATA)
    ray.shutdown()
    for call in (lambda: tier.read(handle), lambda: tier.write(random_pages(1), METADATA)):
        with pytest.raises(ClusterError, match="Ray is not connected"):
            call()
    assert not ray.is_initialized()
    with connect(ClusterConfig(num_cpus=1)):
        with pytest.raises(ClusterError, match="was shut down and started again"):
            tier.read(handle)
        assert RayPageTier().handles == []
