"""How far a run has come: a small frozen dataclass that a checkpoint keeps as JSON."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from moe_bitnet.errors import CheckpointError


@dataclass(frozen=True)
class TrainingState:
    """Progress of a run; random state is not needed, since batches depend on the step alone.

    Attributes:
        step: steps that are done.
        num_tokens: tokens seen in them, over all workers.
        train_s: seconds spent in them, with compilation, evaluation and checkpoints, over all attempts.
        timed_tokens: tokens of the steps in ``timed_s``.
        timed_s: seconds of the steps alone, without the first of each attempt, which compiles.
        validation_loss: of the last evaluation, nats a token; ``None`` before the first one.
    """

    step: int = 0
    num_tokens: int = 0
    train_s: float = 0.0
    timed_tokens: int = 0
    timed_s: float = 0.0
    validation_loss: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """Speed of a step, or of the whole run where no step was timed."""
        if self.timed_s > 0:
            return self.timed_tokens / self.timed_s
        return self.num_tokens / self.train_s if self.train_s > 0 else 0.0

    @classmethod
    def from_dict(cls, values: Any, source: str) -> "TrainingState":
        """Build a state from parsed JSON.

        Raises:
            CheckpointError: fields are missing, unknown or not numbers of 0 or more.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise CheckpointError(f"{source}: expected the fields {sorted(names)}. Start in another out_folder.")
        for field in dataclasses.fields(cls):
            value = values[field.name]
            if value is None and field.default is None:
                continue
            kinds = (int,) if field.type is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < float("inf"):
                raise CheckpointError(f"{source}: {field.name} is {value!r}, not a number of 0 or more.")
        return cls(**values)
