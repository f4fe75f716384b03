import os
import time
from contextlib import ExitStack

import psutil
import pytest
import ray
import torch
from host_factories import experts_of, frame_for, host_for, model_of

from cluster.actors import RayHostClient, start_actor
from cluster.config import ClusterConfig
from cluster.expert_host import slice_experts
from cluster.runtime import connect
from cluster.transport.codec import encode
from moe_bitnet.checkpoint.pack import model_layout
from moe_bitnet.errors import ClusterError, PlacementError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model():
    return model_of("2bit")


@pytest.fixture(scope="module")
def connection():
    with ExitStack() as stack:
        stack.enter_context(connect(ClusterConfig(num_cpus=1)))
        yield stack


@pytest.fixture(scope="module")
def actor(connection, model):
    """A host with the memory of three experts, which holds experts 1 and 3 of layer 0."""
    experts = slice_experts(experts_of(model), 0, [1, 3])
    actor = start_actor("small", experts.num_bytes * 3 // 2, model.config, model_layout(model))
    assert RayHostClient(actor, "small", timeout_s=120).load([experts])() == experts.num_bytes
    return actor


@pytest.fixture
def client(actor):
    return RayHostClient(actor, "small", timeout_s=60)


def frame_of(expert_ids):
    rows = torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    return encode(frame_for(rows, torch.tensor([expert_ids]), expert_ids, "int8")[0])


def test_an_actor_answers_as_its_host(client, model):
    assert client.send(frame_of([1, 3]))() == host_for(model, [1, 3]).answer(frame_of([1, 3]))


def test_answers_may_be_awaited_in_any_order(client, model):
    first, second = client.send(frame_of([1])), client.send(frame_of([3]))
    host = host_for(model, [1, 3])
    assert second() == host.answer(frame_of([3]))
    assert first() == host.answer(frame_of([1]))


def test_a_refusal_of_the_host_comes_out_as_it_was_raised(client):
    with pytest.raises(ClusterError, match="'small' does not hold expert 0 of layer 0"):
        client.send(frame_of([0, 1]))()
    with pytest.raises(ClusterError, match="frame refused: checksum"):
        client.send(frame_of([1])[:-1] + b"?")()


def test_experts_that_do_not_fit_come_out_as_a_placement_error(client, model):
    with pytest.raises(PlacementError, match=r"'small' holds .* bytes are missing") as caught:
        client.load([slice_experts(experts_of(model, 1), 1, [0, 2])])()
    assert type(caught.value) is PlacementError


def test_a_slow_host_is_an_error_that_names_it(actor, client):
    is_done = actor.__ray_call__.remote(lambda _: time.sleep(1.5))
    client.timeout_s = 0.1
    with pytest.raises(ClusterError, match=r"'small' did not answer within 0\.1 s\. Raise .*request_timeout_s"):
        client.send(frame_of([1]))()
    ray.get(is_done, timeout=60)


def test_a_late_answer_is_not_taken_for_the_next_one(actor, client, model):
    is_done = actor.__ray_call__.remote(lambda _: time.sleep(0.5))
    client.timeout_s = 0.1
    with pytest.raises(ClusterError):
        client.send(frame_of([1]))()
    client.timeout_s = 60
    assert client.send(frame_of([3]))() == host_for(model, [1, 3]).answer(frame_of([3]))
    ray.get(is_done, timeout=60)


def test_a_host_that_dies_at_work_is_an_error_that_names_it(actor, client):
    """The last test of the actor: it ends here."""
    actor.__ray_call__.remote(lambda _: (time.sleep(0.2), os._exit(1)))
    receive = client.send(frame_of([1]))
    for wait in (receive, client.send(frame_of([1]))):  # at work, and afterwards
        with pytest.raises(ClusterError, match="'small' died"):
            wait()


def test_a_ray_that_was_started_is_gone_afterwards(connection):
    """The last test of all: the connection ends here."""
    raylets = [process for process in psutil.Process().children(recursive=True) if "raylet" in process.name()]
    assert raylets
    connection.close()
    assert not ray.is_initialized()
    assert not psutil.wait_procs(raylets, timeout=20)[1]
