"""What workers decide together: worker 0 tells the others, or all tell each other what went wrong.

Each function adds up one tensor over all workers, so that every worker must call it at the same point.
"""

from collections.abc import Callable, Sequence

import torch

from cluster.training.engine import Engine
from moe_bitnet.errors import CheckpointError

_MAX_TEXT_BYTES = 1000


def tell_all(engine: Engine, values: Sequence[float]) -> list[float]:
    """Return worker 0's ``values`` on every worker; their number must be the same everywhere."""
    message = torch.tensor(values, dtype=torch.float64, device=engine.device)
    if engine.rank:
        message.zero_()
    told: list[float] = engine.sum_over_workers(message).tolist()
    return told


def share_texts(engine: Engine, text: str) -> list[str]:
    """Return every worker's text, by rank; long ones are cut."""
    data = text.encode()[:_MAX_TEXT_BYTES]
    rows = torch.zeros(engine.world_size, _MAX_TEXT_BYTES, dtype=torch.float64, device=engine.device)
    rows[engine.rank, : len(data)] = torch.tensor(list(data), dtype=torch.float64)
    shared = engine.sum_over_workers(rows).to("cpu", torch.uint8)
    return [bytes(row.tolist()).rstrip(b"\0").decode("utf-8", "replace") for row in shared]


def first_answers(engine: Engine, question: Callable[[], int | None]) -> int | None:
    """Ask worker 0 alone, and return its answer on every worker.

    Args:
        engine: of all workers.
        question: returns a number of 0 or more, or ``None``; may raise ``CheckpointError``.
    Raises:
        CheckpointError: the question raised it; on all workers.
    """
    answer, problem = None, ""
    if engine.rank == 0:
        try:
            answer = question()
        except CheckpointError as error:
            problem = str(error)
    told, has_failed = tell_all(engine, (-1.0 if answer is None else float(answer), float(bool(problem))))
    if has_failed:
        raise CheckpointError(share_texts(engine, problem)[0])
    return None if told < 0 else int(told)
