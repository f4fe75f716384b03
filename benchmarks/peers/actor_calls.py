"""Ray actor calls as a peer: the same bytes there and back by method calls of actors, one for each host."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from cluster.config import ClusterConfig
from cluster.runtime import connect

_NUM_CPUS = 2


class _Echo:
    """Answers requests of any bytes with as many bytes as it is asked for."""

    def __init__(self) -> None:
        self._answers: dict[int, bytes] = {}

    def exchange(self, request: bytes, answer_bytes: int) -> bytes:
        return self._answers.setdefault(answer_bytes, bytes(answer_bytes))


class ActorCalls:
    """Calls actors and waits for all of them.

    Args:
        actors: one for each host.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors

    def exchange(self, request: bytes, answer_bytes: int) -> None:
        """Send a request to every actor, then receive every answer."""
        ray.get([actor.exchange.remote(request, answer_bytes) for actor in self._actors])


@contextmanager
def actor_calls(num_hosts: int) -> Iterator[ActorCalls]:
    """Start a local Ray with one actor for each host; all end with the block."""
    with connect(ClusterConfig(num_cpus=_NUM_CPUS)):
        # Ray's decorator turns the class into something that type checkers do not see
        actor_class: Any = ray.remote(num_cpus=0)(_Echo)
        yield ActorCalls([actor_class.remote() for _ in range(num_hosts)])
