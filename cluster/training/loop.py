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
from cluster.training.config import TrainConfig
from cluster.training.divergence import LossWatch, check_finite, check_finite_parameters
from cluster.training.engine import Engine
from cluster.training.evaluation import Evaluation, evaluate
from cluster.training.metrics import Line, evaluation_line, training_line
from cluster.training.objective import LossTerms, Objective
from cluster.training.optimizer import set_step_size
from cluster.training.schedule import learning_rate_at, weight_decay_at
from cluster.training.state import TrainingState
from moe_bitnet.errors import TrainingError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopHooks:
    """What the loop takes from and gives to the outside.

    Attributes:
        train_batch: step (from 0) → this worker's inputs and targets.
        validation_batches: makes the batches of an evaluation, the same on all workers.
        append_line: takes a line of metrics; called on worker 0 alone.
        save: writes a checkpoint; called on worker 0 alone.
        should_stop: asked after each step.
        discard: deletes the checkpoint after that many steps, if there is one, which the next loss proved bad;
            called on worker 0 alone.
        recent_losses: of the steps before the first, oldest first; what a resumed run judges spikes by.
    """

    train_batch: Callable[[int], Batch]
    validation_batches: Callable[[], Iterable[Batch]]
    append_line: Callable[[Line], None]
    save: Callable[[TrainingState], object]
    should_stop: Callable[[], bool]
    discard: Callable[[int], object] = lambda step: None
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
class _StepResult:
    """Means over all workers, and whether one of them was asked to stop."""

    losses: tuple[float, float, float]
    tokens_per_expert: Tensor
    is_stop_requested: bool


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

    def run(self, state: TrainingState) -> LoopResult:
        """Train from ``state`` on.

        Raises:
            TrainingError: the loss jumped, or it or a parameter is not finite; no checkpoint is written after that.
        """
        evaluation: Evaluation | None = None
        first_step, is_main = state.step, self.engine.rank == 0
        saved_at = lap = time.monotonic()
        while state.step < self.config.num_steps:
            result, step_s = self._timed_step(state.step)
            state = self._advance(state, step_s, is_timed=state.step > first_step)
            is_last = state.step == self.config.num_steps
            is_stopping = result.is_stop_requested and not is_last
            is_due = is_last or state.step % self.config.eval_every_steps == 0
            evaluation = self._evaluate(state.step) if is_due and not is_stopping else None
            now = time.monotonic()
            state, lap = replace(state, train_s=state.train_s + now - lap), now
            if is_main:
                self._append_lines(state, result, step_s, evaluation)
                is_save_due = now - saved_at >= self.config.checkpoint_every_s and self._watch.is_calm
                if is_last or is_stopping or is_save_due:
                    self._save(state)
                    saved_at = time.monotonic()
            if is_stopping:
                logger.info(
                    "stopped at step %d/%d as asked; a checkpoint was written", state.step, self.config.num_steps
                )
                return LoopResult(state, None)
        return LoopResult(state, evaluation or self._evaluate(state.step))

    def step(self, step: int) -> _StepResult:
        """Run one forward pass, backward pass and update.

        Args:
            step: counted from 0.
        Raises:
            TrainingError: the loss jumped or is not finite; the parameters stay as they were.
        """
        config, engine = self.config, self.engine
        inputs, targets = (torch.from_numpy(array).to(engine.device) for array in self.hooks.train_batch(step))
        output = engine.forward(inputs)
        terms = self.objective(output, targets)
        result = self._gather(terms, output.tokens_per_expert)
        self._check_losses(step, result.losses)
        engine.backward(terms.total)
        set_step_size(
            engine.optimizer,
            learning_rate_at(step, config.num_steps, config.num_warmup_steps, self.peak_learning_rate),
            weight_decay_at(step, config.num_steps, config.weight_decay),
        )
        engine.step()
        return result

    def _check_losses(self, step: int, losses: tuple[float, float, float]) -> None:
        check_finite(step + 1, losses, self.engine.model)
        try:
            self._watch.check(step + 1, losses[0])
        except TrainingError:
            if self.engine.rank == 0:
                self.hooks.discard(step)
            raise

    def _timed_step(self, step: int) -> tuple[_StepResult, float]:
        start = time.monotonic()
        result = self.step(step)
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        return result, time.monotonic() - start

    def _gather(self, terms: LossTerms, tokens_per_expert: Tensor) -> _StepResult:
        """Average over workers; one message a step."""
        scalars = torch.stack((terms.loss, terms.load_balance_loss, terms.router_z_loss)).detach().double()
        is_asked = scalars.new_tensor([float(self.hooks.should_stop())])
        message = torch.cat((scalars, is_asked, tokens_per_expert.flatten().double()))
        total = self.engine.sum_over_workers(message).cpu()
        loss, load_balance, router_z = (total[:3] / self.engine.world_size).tolist()
        return _StepResult((loss, load_balance, router_z), total[4:].view(tokens_per_expert.shape), bool(total[3] > 0))

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
        evaluation = evaluate(self.engine, self.objective, self.hooks.validation_batches())
        if not math.isfinite(evaluation.loss):
            raise TrainingError(
                f"step {step}: the validation loss is {evaluation.loss}. The last checkpoint is kept; "
                f"try a lower peak_learning_rate."
            )
        return evaluation

    def _append_lines(
        self, state: TrainingState, result: _StepResult, step_s: float, evaluation: Evaluation | None
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
                elapsed_s=state.train_s,
            )
        )
        logger.info(
            "step %d/%d  loss %.3f  %.1fk tok/s", state.step, config.num_steps, result.losses[0], tokens_per_s / 1e3
        )
        if evaluation is not None:
            self.hooks.append_line(
                evaluation_line(step=state.step, tokens=state.num_tokens, loss=evaluation.loss, elapsed_s=state.train_s)
            )
            logger.info("step %d/%d  validation loss %.3f", state.step, config.num_steps, evaluation.loss)

    def _save(self, state: TrainingState) -> None:
        """Write a checkpoint, unless a finite loss had gradients that were not."""
        check_finite_parameters(state.step, self.engine.model)
        self.hooks.save(state)
