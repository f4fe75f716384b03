"""How often a run's workers were started, and how many they were: ``<out>/attempts.jsonl``, a JSON object a line.

Worker 0 of each group writes a line when it starts. Those with the same ``call``
belong to one call of ``train``; all but the first of them are restarts.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

ATTEMPTS_NAME = "attempts.jsonl"


@dataclass(frozen=True)
class Attempt:
    """One start of a group of workers.

    Attributes:
        call: names the call of ``train`` that it belongs to.
        started_at: ISO 8601, UTC.
        num_workers: workers of the group.
        device: kind of the workers' devices, ``"cpu"`` or ``"cuda"``.
    """

    call: str
    started_at: str
    num_workers: int
    device: str


def append_attempt(out_folder: Path, attempt: Attempt) -> None:
    """Write down that a group of workers starts."""
    out_folder.mkdir(parents=True, exist_ok=True)
    with (out_folder / ATTEMPTS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(attempt)) + "\n")


def read_attempts(out_folder: Path) -> list[Attempt]:
    """Return all starts of a run's workers, oldest first; lines that are damaged are left out."""
    try:
        lines = (out_folder / ATTEMPTS_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    attempts = []
    for line in lines:
        try:
            attempts.append(Attempt(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return attempts


def num_restarts(attempts: list[Attempt]) -> int:
    """Return how often workers were started again within the last call of ``train``."""
    return sum(attempt.call == attempts[-1].call for attempt in attempts) - 1 if attempts else 0
