"""The exceptions of all three packages, and nothing else.

Every message says what was given, what is allowed and what to do. The command
line prints the message alone and exits with code 2; a bug raises anything else.

    MoEBitNetError
    ├── ConfigError       sizes or settings that cannot work together
    ├── ShapeError        a tensor of the wrong shape or dtype
    ├── DataError         text, shards or a tokenizer that cannot be read or used
    ├── CheckpointError   a checkpoint that is missing, truncated, altered or of another kind
    ├── BackendError      a kernel backend that was asked for and is absent
    ├── TrainingError     a run that cannot go on (a loss that is not finite)
    ├── CacheFullError    no page is free in the KV cache
    ├── PlacementError    experts that do not fit on the devices
    └── ClusterError      Ray or an expert host that does not answer
        ├── FrameError        bytes from a peer that break the protocol
        ├── StalePlanError    a frame of a plan that is no longer, or not yet, followed
        ├── BulkChannelError  a bulk channel that broke; frames go by the socket again
        └── HostDownError     an expert host that died, cannot be reached or is too slow
"""


class MoEBitNetError(Exception):
    """Base of every error that a user's input or machine can cause.

    Subclasses take one message string and add no state, so that they survive
    pickling when Ray carries them from an actor to the caller.
    """


class ConfigError(MoEBitNetError, ValueError):
    """Settings are impossible or contradict each other."""


class ShapeError(MoEBitNetError, ValueError):
    """A tensor has a shape or dtype that the operation does not take."""


class DataError(MoEBitNetError):
    """Text, token shards or a tokenizer cannot be read or used."""


class CheckpointError(MoEBitNetError):
    """A checkpoint is missing, truncated, altered or of another kind."""


class BackendError(MoEBitNetError):
    """A kernel backend was asked for by name and is not available."""


class TrainingError(MoEBitNetError):
    """Training cannot go on; the last good checkpoint is kept."""


class CacheFullError(MoEBitNetError):
    """The KV cache has no free page for the tokens that were appended."""


class PlacementError(MoEBitNetError):
    """Experts do not fit on the devices that were given."""


class ClusterError(MoEBitNetError):
    """Ray or an expert host does not answer, or refused a request."""


class FrameError(ClusterError):
    """A peer sent bytes that break the protocol; its connection is dropped."""


class StalePlanError(ClusterError):
    """A frame follows a plan that its receiver does not follow."""


class BulkChannelError(ClusterError):
    """A bulk channel between a dispatcher and a host broke."""


class HostDownError(ClusterError):
    """An expert host died, cannot be reached, or did not answer in time."""
