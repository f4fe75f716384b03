"""The metrics of a run: ``metrics.jsonl``, one JSON object a line, and the same numbers for TensorBoard.

A training line has ``step, tokens, loss, load_balance_loss, router_z_loss,
learning_rate, tokens_per_s, expert_load_cv, expert_load_min, expert_load_max, num_idle_experts, gradient_norm,
dispatch_bytes, elapsed_s``; an evaluation line has ``step, tokens, validation_loss, validation_ppl, expert_load,
elapsed_s``. Steps count from 1, and ``elapsed_s`` goes on where the resumed checkpoint left it. The load of an expert
is a multiple of the even share in a training line (a list of one number a layer), and a share of its layer's visits
in an evaluation line (a list of one list a layer).
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tensorboardX import SummaryWriter

from moe_bitnet.files import write_text_atomically

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_NOT_SCALARS = ("step", "tokens", "elapsed_s")
_MAX_EXPONENT = 700.0  # beyond that a float overflows, and JSON has no infinity

Line = Mapping[str, Any]


class MetricsLog:
    """Appends lines to ``metrics.jsonl`` and to TensorBoard's event files.

    Args:
        out_folder: of the run.
        step: the run goes on after this step: later lines, which an interrupted attempt left, are dropped.
    """

    def __init__(self, out_folder: Path, step: int) -> None:
        out_folder.mkdir(parents=True, exist_ok=True)
        path = out_folder / METRICS_NAME
        drop_lines_after(path, step)
        # tensorboardX logs what it opens; that line says nothing to a user
        logging.getLogger("tensorboardX").setLevel(logging.WARNING)
        self._file = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(out_folder / TENSORBOARD_FOLDER), purge_step=step + 1)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def append(self, line: Line) -> None:
        """Write one line; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in scalars(line):
            self._writer.add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._writer.close()


def drop_lines_after(path: Path, step: int) -> None:
    """Remove lines of later steps, and lines that are cut off or damaged, in one atomic replacement.

    Args:
        path: a ``metrics.jsonl``; a missing one stays missing.
        step: the last step whose lines stay; 0 drops all.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
    if kept != lines:
        write_text_atomically(path, "".join(f"{line}\n" for line in kept))


def read_losses(path: Path, step: int, num_losses: int) -> list[float]:
    """Return the losses of the last ``num_losses`` training steps up to ``step``, oldest first.

    Args:
        path: a ``metrics.jsonl``; a missing one has none.
        step: the last step that counts.
        num_losses: how many to return at most.
    """
    if not path.exists():
        return []
    losses: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        at = _step_of(line)
        if at is not None and at <= step and "loss" in (values := json.loads(line)):
            losses[at] = float(values["loss"])
    return [losses[at] for at in sorted(losses)][-num_losses:]


def scalars(line: Line) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line with their names on TensorBoard; of loads one a layer, of shares their variation."""
    kind = "validation" if "validation_loss" in line else "train"
    for name, value in line.items():
        if name in _NOT_SCALARS:
            continue
        tag = f"{kind}/{name.removeprefix('validation_')}"
        if not isinstance(value, list):
            yield tag, value
        elif name == "expert_load":
            for layer, shares in enumerate(value):
                yield f"{tag}_cv/layer_{layer}", load_coefficient_of_variation(torch.tensor([shares]))
        else:
            yield from ((f"{tag}/layer_{layer}", each) for layer, each in enumerate(value))
    if "loss" in line:
        yield "train/ppl", math.exp(min(line["loss"], _MAX_EXPONENT))


def load_coefficient_of_variation(tokens_per_expert: torch.Tensor) -> float:
    """Return std / mean of the experts' loads ``[num_layers, E]``, averaged over layers; 0 is an even load."""
    loads = tokens_per_expert.double()
    return float((loads.std(dim=1, correction=0) / loads.mean(dim=1)).mean())


def training_line(
    *,
    step: int,
    tokens: int,
    losses: tuple[float, float, float],
    learning_rate: float,
    tokens_per_s: float,
    tokens_per_expert: torch.Tensor,
    gradient_norm: float,
    dispatch_bytes: float,
    elapsed_s: float,
) -> dict[str, Any]:
    """Make the line of a training step; ``losses`` are cross entropy, load balance and z, unweighted."""
    loads = tokens_per_expert.double() / tokens_per_expert.double().mean(dim=1, keepdim=True)
    return {
        "step": step,
        "tokens": tokens,
        "loss": losses[0],
        "load_balance_loss": losses[1],
        "router_z_loss": losses[2],
        "learning_rate": learning_rate,
        "tokens_per_s": round(tokens_per_s, 1),
        "expert_load_cv": load_coefficient_of_variation(tokens_per_expert),
        "expert_load_min": _rounded(loads.amin(dim=1)),
        "expert_load_max": _rounded(loads.amax(dim=1)),
        "num_idle_experts": int((tokens_per_expert == 0).sum()),
        "gradient_norm": gradient_norm,
        "dispatch_bytes": dispatch_bytes,
        "elapsed_s": round(elapsed_s, 3),
    }


def evaluation_line(
    *, step: int, tokens: int, loss: float, elapsed_s: float, expert_load: Sequence[Sequence[float]] = ()
) -> dict[str, Any]:
    """Make the line of an evaluation with mean cross entropy ``loss`` in nats a token, and each expert's share."""
    line: dict[str, Any] = {
        "step": step,
        "tokens": tokens,
        "validation_loss": loss,
        "validation_ppl": math.exp(min(loss, _MAX_EXPONENT)),
        "elapsed_s": round(elapsed_s, 3),
    }
    if expert_load:
        line["expert_load"] = [[round(share, 5) for share in layer] for layer in expert_load]
    return line


def _rounded(loads: torch.Tensor) -> list[float]:
    return [round(load, 3) for load in loads.tolist()]


def _step_of(line: str) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
