"""How to reach a cluster and in which format rows travel: one frozen, flat dataclass."""

from dataclasses import dataclass
from typing import get_args

from cluster.transport.row_format import Combine, CombineMode, RowFormat
from moe_bitnet.errors import ConfigError

_LONGEST_S = 10**6  # ZeroMQ takes milliseconds of 31 bits


@dataclass(frozen=True)
class ClusterConfig:
    """Settings of a connection to Ray and of the data path between devices.

    Attributes:
        address: address of a running Ray cluster, such as ``"10.0.0.1:6379"``; ``None`` starts a local Ray.
        num_cpus: CPUs that a local Ray may use; ``None`` lets Ray count them. Only with ``address=None``.
        connect_timeout_s: seconds to wait for Ray and for expert hosts to come up, above 0.
        request_timeout_s: seconds to wait for one answer of an expert host, above 0; a host that is slower counts as
            down, and another copy of its experts is asked.
        retry_after_s: seconds after which a host that was down is tried again, above 0.
        heartbeat_s: a host that is silent for so long counts as down, above 0.
        bulk_min_bytes: frames between machines of at least so many bytes go through a gloo process group of dispatcher
            and host, five times as fast as through the encrypted socket, and **not encrypted**: for networks that you
            trust; ``None``, the default, encrypts everything.
        dispatch: format of the rows on the way to the experts. ``"int8"`` sends what a ternary expert
            would quantize anyway, so it changes no bit of the result.
        has_dedup: send a row once to each device; ``False``, once to each expert, is there to compare with.
        combine: ``"partial_sums"``: a host sends one weighted sum a token, fewer bytes; ``"rows"``: one row a
            (token, expert), summed at home in the order of one process.
        combine_format: format of the rows on the way back. With ``"rows"`` and ``"float32"`` logits are those of one
            process bit for bit; partial sums in float32 differ by the order of a sum.

    Raises:
        ConfigError: a value is not allowed; the message names it.
    """

    address: str | None = None
    num_cpus: int | None = None
    connect_timeout_s: float = 30.0
    request_timeout_s: float = 30.0
    retry_after_s: float = 1.0
    heartbeat_s: float = 0.6
    bulk_min_bytes: int | None = None
    dispatch: RowFormat = "int8"
    has_dedup: bool = True
    combine: CombineMode = "partial_sums"
    combine_format: RowFormat = "float32"

    def __post_init__(self) -> None:
        if self.address is not None and (not isinstance(self.address, str) or not self.address.strip()):
            raise ConfigError(
                f"ClusterConfig: address is {self.address!r}; give host:port, or None to start a local Ray."
            )
        self._check_num_cpus()
        for name in ("connect_timeout_s", "request_timeout_s", "retry_after_s", "heartbeat_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LONGEST_S:
                raise ConfigError(f"ClusterConfig: {name} is {value!r}; give seconds above 0, at most {_LONGEST_S}.")
        self._check_bulk_min_bytes()
        for name, allowed in (
            ("dispatch", get_args(RowFormat)),
            ("has_dedup", (True, False)),
            ("combine", get_args(CombineMode)),
            ("combine_format", get_args(RowFormat)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                names = ", ".join(str(each) for each in allowed)
                raise ConfigError(f"ClusterConfig: {name} is {value!r}; allowed are {names}.")

    @property
    def returned(self) -> Combine:
        """``combine`` and ``combine_format`` together."""
        return Combine(self.combine, self.combine_format)

    def _check_bulk_min_bytes(self) -> None:
        value = self.bulk_min_bytes
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"ClusterConfig: bulk_min_bytes is {value!r}; give an integer of at least 1, or None.")

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
