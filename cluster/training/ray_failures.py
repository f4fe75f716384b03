"""Which failures start workers again, and what the user is told of those that do not.

A worker that dies, or that lost another one, is started again. An exception of ours
says that the same would happen again (the loss is not finite, the disk is full,
the folder holds another run): it ends the run at once, and comes out as it was raised.
"""

from collections.abc import Iterator
from typing import Any

import ray.exceptions
import ray.train
import torch.distributed
from ray.train import UserCallback

from moe_bitnet.errors import ClusterError, MoEBitNetError


class StopAtOurErrors(UserCallback):  # type: ignore[misc]
    """Ends a run when a worker raised an exception of ours; Ray would start the workers again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first of them: Ray does not retry what fails in its own process."""
        for error in worker_exceptions.values():
            if isinstance(error, MoEBitNetError):
                raise error


def translate(error: Exception, max_restarts: int) -> Exception:
    """Find the exception that a user should see behind those of Ray; one that is a bug stays as it is."""
    bug: Exception = error
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, MoEBitNetError):
            return cause
    if not isinstance(error, (ray.train.TrainingFailedError, ray.exceptions.RayError)):
        return bug
    deaths = [cause for cause in causes[1:] if isinstance(cause, ray.exceptions.RayError) or _is_of_a_lost_peer(cause)]
    if isinstance(error, ray.train.WorkerGroupError):
        if not deaths:
            return bug
        return ClusterError(
            f"A training worker died, after {max_restarts} restarts ({_first_line(deaths[0])}). Is there enough "
            f"memory? The same command resumes from the last checkpoint."
        )
    return ClusterError(
        f"Ray stopped the training ({_first_line(causes[-1])}). The same command resumes from the last checkpoint."
    )


def _causes(error: Exception) -> Iterator[Exception]:
    """Yield an exception and those within it, as Ray nests them."""
    yield error
    inner: list[Any] = [
        *getattr(error, "worker_failures", {}).values(),
        getattr(error, "controller_failure", None),
        getattr(error, "_base_exc", None),
        getattr(error, "health_check_failure", None),
        getattr(error, "cause", None),
    ]
    for each in inner:
        if isinstance(each, Exception) and each is not error:
            yield from _causes(each)


def _is_of_a_lost_peer(error: Exception) -> bool:
    """Whether a worker only lost the connection to one that died; gloo raises no exception of its own kind."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/transport/" in str(error)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
