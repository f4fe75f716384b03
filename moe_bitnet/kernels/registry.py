"""Which function computes an operation: backends by name, chosen loudly.

A backend is a name and a table of functions, all with the signatures of
:mod:`moe_bitnet.kernels.backend_reference`. The first available backend in the
order of preference that has an operation wins. If a preferred backend could not
be loaded, the first selection that passes over it logs a warning with the reason.

``MOE_BITNET_BACKEND=reference`` (or any other name) pins one backend for every operation it has.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_bitnet.errors import BackendError

logger = logging.getLogger(__name__)

BACKEND_VARIABLE = "MOE_BITNET_BACKEND"

Operation = Callable[..., Any]


@dataclass(frozen=True)
class Backend:
    """A named set of operations.

    Attributes:
        name: ``"reference"``, ``"cpp"`` or ``"triton"``.
        operations: functions by operation name; empty if the backend is absent.
        device_types: torch device types whose tensors it takes.
        absent_because: why it could not be loaded, or ``None``.
    """

    name: str
    operations: Mapping[str, Operation]
    device_types: tuple[str, ...]
    absent_because: str | None = None


@dataclass
class Registry:
    """Backends in order of preference; the last one is the reference and has every operation."""

    backends: list[Backend]
    _announced: set[str] = field(default_factory=set)

    def names(self) -> list[str]:
        """Return the names of all backends, absent ones included."""
        return [backend.name for backend in self.backends]

    def backend(self, name: str) -> Backend:
        """Return an available backend by name.

        Raises:
            BackendError: there is none of that name, or it could not be loaded (with the reason).
        """
        for backend in self.backends:
            if backend.name == name:
                if backend.absent_because:
                    raise BackendError(f"backend {name!r} is not available: {backend.absent_because}")
                return backend
        raise BackendError(f"backend {name!r} is unknown; allowed are {', '.join(self.names())}.")

    def select(self, operation: str, device_type: str = "cpu", backend: str | None = None) -> Operation:
        """Return the function that computes ``operation``.

        Args:
            operation: such as ``"quantize_activation"``.
            device_type: where the tensors live, such as ``"cpu"``.
            backend: a name, or ``None`` for the environment's choice and then the order of preference.
        Raises:
            BackendError: the named backend is absent, or has no such operation for that device.
        """
        wanted = backend or os.environ.get(BACKEND_VARIABLE)
        if backend:
            chosen = self.backend(backend)
            if operation not in chosen.operations or device_type not in chosen.device_types:
                raise BackendError(f"backend {backend!r} has no {operation} for {device_type} tensors.")
            return chosen.operations[operation]
        if wanted:
            chosen = self.backend(wanted)
            if operation in chosen.operations and device_type in chosen.device_types:
                return chosen.operations[operation]
            self._announce(f"{wanted} has no {operation} for {device_type} tensors; using another backend")
        for candidate in self.backends:
            if device_type not in candidate.device_types:
                continue
            if candidate.absent_because:
                self._announce(
                    f"backend {candidate.name} is not available ({candidate.absent_because}); using the next"
                )
            elif operation in candidate.operations:
                return candidate.operations[operation]
        raise BackendError(f"no backend has {operation} for {device_type} tensors.")

    def _announce(self, message: str) -> None:
        if message not in self._announced:
            self._announced.add(message)
            logger.warning(message)
