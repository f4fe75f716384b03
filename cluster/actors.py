"""Ray around the expert host: the actor, and the client that reaches it."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.exceptions

from cluster.expert_host import ExpertHost, ExpertSlice
from cluster.transport.row_format import CombineFormat
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ClusterError, MoEBitNetError
from moe_bitnet.packing import Layout

logger = logging.getLogger(__name__)


@ray.remote(num_cpus=0, max_restarts=0)
class ExpertHostActor:
    """One device's experts in a process of their own; see :class:`cluster.expert_host.ExpertHost`.

    It asks Ray for no CPU: a logical device is a share of memory, and a device that
    Ray cannot give would make the creation wait for ever without a word.
    """

    def __init__(
        self,
        device_name: str,
        usable_bytes: int,
        config: ModelConfig,
        layout: Layout | None,
        combine: CombineFormat = "float32",
        epoch: int = 0,
    ) -> None:
        self._host = ExpertHost(device_name, usable_bytes, config, layout, combine, epoch)

    def load(self, slices: Sequence[ExpertSlice]) -> int:
        """Take the experts of some layers; returns the bytes held."""
        for experts in slices:
            self._host.load(experts)
        return self._host.held_bytes

    def answer(self, frame: bytes) -> bytes:
        """Run one dispatch frame; returns the combine frame."""
        return self._host.answer(frame)


class RayHostClient:
    """Reaches an :class:`ExpertHostActor` by actor calls.

    Args:
        actor: handle of the actor.
        device_name: for messages.
        timeout_s: seconds to wait for an answer.
    """

    def __init__(self, actor: Any, device_name: str, timeout_s: float) -> None:
        self._actor = actor
        self._device_name = device_name
        self.timeout_s = timeout_s

    def send(self, frame: bytes) -> Callable[[], bytes]:
        """Send a dispatch frame; the returned function waits for the combine frame."""
        answer = self._actor.answer.remote(frame)
        return lambda: self._wait(answer)

    def load(self, slices: Sequence[ExpertSlice]) -> Callable[[], int]:
        """Send experts through the object store; the returned function waits and gives the bytes held."""
        held = self._actor.load.remote(ray.put(slices))
        return lambda: self._wait(held)

    def kill(self) -> None:
        """End the actor's process at once; one that cannot be reached any more is logged, not raised."""
        try:
            ray.kill(self._actor)
        except (ray.exceptions.RayError, ValueError, RuntimeError) as error:
            logger.warning("host %s could not be ended: %s", self._device_name, error)

    def _wait(self, reference: Any) -> Any:
        try:
            return ray.get(reference, timeout=self.timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(
                f"host {self._device_name!r} did not answer within {self.timeout_s} s. "
                f"Raise connect_timeout_s for loading or request_timeout_s for answers, or start the hosts again."
            ) from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MoEBitNetError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:  # the actor, its node or the answer is gone
            raise ClusterError(f"host {self._device_name!r} died ({error}). Start the hosts again.") from error


def start_actor(*arguments: Any) -> Any:
    """Start an :class:`ExpertHostActor` with its arguments; returns its handle without waiting."""
    # Ray's decorator turns the class into something that type checkers do not see
    actor_class: Any = ExpertHostActor
    return actor_class.remote(*arguments)
