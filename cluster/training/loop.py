"""The training loop: steps, evaluations and checkpoints in their order, with any engine.

Batches come by step number, so that the loop has nothing to remember but
:class:`~cluster.training.state.TrainingState`. With several workers each runs this loop; whether to
stop and whether the loss is finite is decided on sums over all of them, so that
none waits for one that left.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.training.batches import Batch
from cluster.training.checkpoint_writer import CheckpointWriter
from cluster.training.config import TrainConfig
from cluster.training.divergence import LossWatch, check_finite, check_finite_parameters
from cluster.training.engine import Engine
from cluster.training.evaluation import Evaluation, evaluate
from cluster.training.fragments import MOMENTS
from cluster.training.metrics import Line, evaluation_line, training_line
from cluster.training.objective import Objective, Score
from cluster.training.optimizer import set_step_size
from cluster.training.schedule import learning_rate_at, router_warmup_at, weight_decay_at
from cluster.training.state import TrainingState
from moe_bitnet.errors import TrainingError
from moe_bitnet.router import load_balance_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopHooks:
    """What the loop takes from and gives to the outside.

    Attributes:
        train_batch: micro-step (from 0, ``gradient_accumulation_steps`` in a step) → this worker's inputs and targets.
        validation_batches: makes the batches of an evaluation, the same on all workers.
        append_line: takes a line of metrics; called on worker 0 alone.
        checkpoints: writes them; on all workers.
        should_stop: asked after each step.
        recent_losses: of the steps before the first, oldest first; what a resumed run judges spikes by.
    """

    train_batch: Callable[[int], Batch]
    validation_batches: Callable[[], Iterable[Batch]]
    append_line: Callable[[Line], None]
    checkpoints: CheckpointWriter
    should_stop: Callable[[], bool]
    recent_losses: Sequence[float] = ()


@dataclass(frozen=True)
class LoopResult:
    """Where the loop ended.

    Attributes:
        state: progress; fewer than ``num_steps`` steps if it was asked to stop.
        evaluation: after the last step, or ``None`` if it was asked to stop.
    """

    state: TrainingState
    evaluation: Evaluation | None


@dataclass(frozen=True)
class StepResult:
    """What all workers know of a step, or of one of its micro-steps.

    Attributes:
        losses: cross entropy, load balance and z, unweighted; means over workers and micro-steps.
        tokens_per_expert: float64 ``[num_layers, E]``, visits of all workers.
        is_stop_requested: one of them was asked to stop.
        is_save_due: worker 0 wants a checkpoint after this step.
        dispatch_bytes: what all of them sent to each other's experts and back, since the step before was scored: the
            forward passes of this step, and the last backward pass of the one before.
        gradient_norm: of the whole gradient before clipping; 0 before the update.
    """

    losses: tuple[float, float, float]
    tokens_per_expert: Tensor
    is_stop_requested: bool
    is_save_due: bool
    dispatch_bytes: float
    gradient_norm: float = 0.0


class TrainingLoop:
    """Trains with an engine until the last step, or until asked to stop.

    Args:
        engine: holds the model and the optimizer.
        objective: what to minimize.
        config: the settings.
        peak_learning_rate: of the schedule.
        hooks: data, metrics, checkpoints.
    """

    def __init__(
        self, engine: Engine, objective: Objective, config: TrainConfig, peak_learning_rate: float, hooks: LoopHooks
    ) -> None:
        self.engine = engine
        self.objective = objective
        self.config = config
        self.peak_learning_rate = peak_learning_rate
        self.hooks = hooks
        self._watch = LossWatch(config.max_loss_rise, hooks.recent_losses)
        self._gradient_norm: float | None = None  # of the last update
        self._saved_at = 0.0
        self._untold_bytes = 0

    def run(self, state: TrainingState) -> LoopResult:
        """Train from ``state`` on.

        Raises:
            TrainingError: the loss jumped, or it or a parameter is not finite; no checkpoint is begun after that.
            CheckpointError: a worker could not write its part of a checkpoint.
        """
        evaluation: Evaluation | None = None
        first_step, is_main = state.step, self.engine.rank == 0
        self._saved_at = lap = time.monotonic()
        while state.step < self.config.num_steps:
            result, step_s = self._timed_step(state.step)
            state = self._advance(state, step_s, is_timed=state.step > first_step)
            is_last = state.step == self.config.num_steps
            is_stopping = result.is_stop_requested and not is_last
            is_due = is_last or state.step % self.config.eval_every_steps == 0
            evaluation = self._evaluate(state.step) if is_due and not is_stopping else None
            now = time.monotonic()
            state, lap = replace(state, train_s=state.train_s + now - lap), now
            if evaluation is not None:
                state = replace(state, validation_loss=evaluation.loss)
            if is_main:
                self._append_lines(state, result, step_s, evaluation)
            if is_last or is_stopping:
                self.hooks.checkpoints.finish()
                self._save(state)
                self.hooks.checkpoints.finish()
            elif result.is_save_due and self._watch.is_calm:
                self._save(state)
            if is_stopping:
                logger.info(
                    "stopped at step %d/%d as asked; a checkpoint was written", state.step, self.config.num_steps
                )
                return LoopResult(state, None)
        return LoopResult(state, evaluation or self._evaluate(state.step))

    def step(self, step: int) -> StepResult:
        """Run the forward and backward passes of a step's micro-steps, and its update.

        Args:
            step: counted from 0.
        Raises:
            TrainingError: the loss jumped, or it or the gradient is not finite; the parameters stay as they were.
        """
        config, engine = self.config, self.engine
        num_parts = config.gradient_accumulation_steps
        parts = []
        for micro_step in range(step * num_parts, (step + 1) * num_parts):
            batch = self.hooks.train_batch(micro_step)
            inputs, targets = (torch.from_numpy(array).to(engine.device) for array in batch)
            score = self.objective.score(engine.forward(inputs), targets)
            part, (num_written, num_failed) = self._gather(score)
            self._check_losses(step, part.losses)
            # only now: a checkpoint under way is completed when the loss after it is known to be sound
            self.hooks.checkpoints.observe(num_written, num_failed)
            engine.backward(self.objective.total(score, part.tokens_per_expert.to(engine.device)))
            parts.append(part)
        set_step_size(
            engine.optimizer,
            learning_rate_at(step, config.num_steps, config.num_warmup_steps, self.peak_learning_rate),
            weight_decay_at(step, config.num_steps, config.weight_decay),
            router_warmup_at(step, config.router_warmup_steps),
        )
        gradient_norm = engine.step()
        if not math.isfinite(gradient_norm):
            check_finite_parameters(step + 1, engine.model)  # names the first one, where it is here
            raise TrainingError(
                f"step {step + 1}: the norm of the gradient is {gradient_norm}; no update was made. The last "
                f"checkpoint is kept. Train in another out_folder with a lower peak_learning_rate or a longer warm-up."
            )
        self._gradient_norm = gradient_norm
        return replace(_join(parts), gradient_norm=gradient_norm)

    def _check_losses(self, step: int, losses: tuple[float, float, float]) -> None:
        check_finite(step + 1, losses, self.engine.model)
        try:
            self._watch.check(step + 1, losses[0], self._gradient_norm)
        except TrainingError:
            self.hooks.checkpoints.discard(step)
            raise

    def _timed_step(self, step: int) -> tuple[StepResult, float]:
        start = time.monotonic()
        result = self.step(step)
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        return result, time.monotonic() - start

    def _gather(self, score: Score) -> tuple[StepResult, tuple[float, float]]:
        """Add up over workers what the step and the checkpoints need of them; one small message a micro-step."""
        scalars = torch.stack((score.loss, score.router_z_loss)).detach().double()
        is_stopping = self.hooks.should_stop()
        dispatch_bytes, self._untold_bytes = self._untold_bytes + self.engine.take_dispatch_bytes(), 0
        num_written, num_failed = self.hooks.checkpoints.signals()
        signals = scalars.new_tensor([is_stopping, dispatch_bytes, num_written, num_failed, self._wants_checkpoint()])
        per_expert = torch.stack((score.tokens_per_expert.double(), score.router_probabilities.detach().double()))
        total = self.engine.sum_over_workers(torch.cat((scalars, signals, per_expert.flatten()))).cpu()
        loss, router_z, num_asked, dispatch_bytes, num_written, num_failed, is_save_due = total[:7].tolist()
        tokens_per_expert, probabilities = total[7:].view(per_expert.shape)
        num_workers = self.engine.world_size
        balance = float(load_balance_loss(probabilities / num_workers, tokens_per_expert))
        losses = (loss / num_workers, balance, router_z / num_workers)
        result = StepResult(losses, tokens_per_expert, num_asked > 0, is_save_due > 0, dispatch_bytes)
        return result, (num_written, num_failed)

    def _wants_checkpoint(self) -> bool:
        """Decide on worker 0 alone, whose clock counts, and who knows last that the checkpoint before is complete."""
        is_late = time.monotonic() - self._saved_at >= self.config.checkpoint_every_s
        return self.engine.rank == 0 and is_late and self.hooks.checkpoints.is_idle

    def _advance(self, state: TrainingState, step_s: float, is_timed: bool) -> TrainingState:
        num_tokens = self.config.tokens_per_step
        return replace(
            state,
            step=state.step + 1,
            num_tokens=state.num_tokens + num_tokens,
            timed_tokens=state.timed_tokens + (num_tokens if is_timed else 0),
            timed_s=state.timed_s + (step_s if is_timed else 0.0),
        )

    def _evaluate(self, step: int) -> Evaluation:
        self._untold_bytes += self.engine.take_dispatch_bytes()  # of the last backward pass
        evaluation = evaluate(self.engine, self.objective, self.hooks.validation_batches())
        self.engine.take_dispatch_bytes()  # those of an evaluation are no step's
        if not math.isfinite(evaluation.loss):
            raise TrainingError(
                f"step {step}: the validation loss is {evaluation.loss}. The last checkpoint is kept; "
                f"try a lower peak_learning_rate."
            )
        return evaluation

    def _append_lines(
        self, state: TrainingState, result: StepResult, step_s: float, evaluation: Evaluation | None
    ) -> None:
        config = self.config
        tokens_per_s = config.tokens_per_step / max(step_s, 1e-9)
        self.hooks.append_line(
            training_line(
                step=state.step,
                tokens=state.num_tokens,
                losses=result.losses,
                learning_rate=learning_rate_at(
                    state.step - 1, config.num_steps, config.num_warmup_steps, self.peak_learning_rate
                ),
                tokens_per_s=tokens_per_s,
                tokens_per_expert=result.tokens_per_expert,
                gradient_norm=result.gradient_norm,
                dispatch_bytes=result.dispatch_bytes,
                elapsed_s=state.train_s,
            )
        )
        logger.info(
            "step %d/%d  loss %.3f  %.1fk tok/s", state.step, config.num_steps, result.losses[0], tokens_per_s / 1e3
        )
        if evaluation is not None:
            self.hooks.append_line(
                evaluation_line(
                    step=state.step,
                    tokens=state.num_tokens,
                    loss=evaluation.loss,
                    expert_load=evaluation.expert_load,
                    elapsed_s=state.train_s,
                )
            )
            logger.info("step %d/%d  validation loss %.3f", state.step, config.num_steps, evaluation.loss)

    def _save(self, state: TrainingState) -> None:
        """Begin a checkpoint, unless a finite loss had gradients that were not."""
        fragments = self.engine.fragments()
        name = next((each.name for each in fragments if not _is_finite(each.values)), None)
        num_bad = self.engine.sum_over_workers(
            torch.tensor([float(name is not None)], dtype=torch.float64, device=self.engine.device)
        )
        if num_bad.item():
            raise TrainingError(
                f"step {state.step}: {_describe(name)} is not finite. The last checkpoint is kept. Train in another "
                f"out_folder with a lower peak_learning_rate or a longer warm-up."
            )
        self.hooks.checkpoints.begin(state, fragments)
        self._saved_at = time.monotonic()


def _is_finite(values: Tensor) -> bool:
    """Look at each element only where their sum, which takes a tenth of the time, is not finite."""
    return math.isfinite(values.sum()) or bool(torch.isfinite(values).all())


def _describe(fragment_name: str | None) -> str:
    if fragment_name is None:
        return "a tensor of another worker"
    return f"{'optimizer state' if fragment_name.endswith(MOMENTS) else 'parameter'} {fragment_name}"


def _join(parts: Sequence[StepResult]) -> StepResult:
    """Join the micro-steps of a step."""
    loss, balance, router_z = (
        sum(values) / len(parts) for values in zip(*(part.losses for part in parts), strict=True)
    )
    return StepResult(
        (loss, balance, router_z),
        torch.stack([part.tokens_per_expert for part in parts]).sum(dim=0),
        any(part.is_stop_requested for part in parts),
        any(part.is_save_due for part in parts),
        sum(part.dispatch_bytes for part in parts),
    )
