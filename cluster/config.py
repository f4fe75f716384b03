"""How to reach a cluster and in which format rows travel: one frozen, flat dataclass."""

from dataclasses import dataclass
from typing import get_args

from cluster.transport.row_format import CombineFormat, RowFormat
from moe_bitnet.errors import ConfigError


@dataclass(frozen=True)
class ClusterConfig:
    """Settings of a connection to Ray and of the data path between devices.

    Attributes:
        address: address of a running Ray cluster, such as ``"10.0.0.1:6379"``; ``None`` starts a local Ray.
        num_cpus: CPUs that a local Ray may use; ``None`` lets Ray count them. Only with ``address=None``.
        connect_timeout_s: seconds to wait for Ray and for expert hosts to come up, above 0.
        request_timeout_s: seconds to wait for one answer of an expert host, above 0.
        dispatch: format of the rows on the way to the experts. ``"int8"`` sends what a ternary expert
            would quantize anyway, so it changes no bit of the result.
        combine: format of the expert outputs on the way back; ``"float32"`` keeps every bit, ``"float16"`` rounds.

    Raises:
        ConfigError: a value is not allowed; the message names it.
    """

    address: str | None = None
    num_cpus: int | None = None
    connect_timeout_s: float = 30.0
    request_timeout_s: float = 30.0
    dispatch: RowFormat = "int8"
    combine: CombineFormat = "float32"

    def __post_init__(self) -> None:
        if self.address is not None and (not isinstance(self.address, str) or not self.address.strip()):
            raise ConfigError(
                f"ClusterConfig: address is {self.address!r}; give host:port, or None to start a local Ray."
            )
        self._check_num_cpus()
        for name in ("connect_timeout_s", "request_timeout_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ConfigError(f"ClusterConfig: {name} is {value!r}; give a positive number of seconds.")
        for name, allowed in (("dispatch", get_args(RowFormat)), ("combine", get_args(CombineFormat))):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"ClusterConfig: {name} is {value!r}; allowed are {', '.join(allowed)}.")

    def _check_num_cpus(self) -> None:
        if self.num_cpus is None:
            return
        if isinstance(self.num_cpus, bool) or not isinstance(self.num_cpus, int) or self.num_cpus < 1:
            raise ConfigError(f"ClusterConfig: num_cpus is {self.num_cpus!r}; give an integer of at least 1, or None.")
        if self.address is not None:
            raise ConfigError(
                f"ClusterConfig: num_cpus {self.num_cpus} was given for the running cluster {self.address!r}, "
                f"which counted its CPUs when it started. Leave num_cpus out, or leave address out."
            )
