"""Learning rate and weight decay by step: pure functions.

::

    peak ......  .
                / ' .             stage one: on the line from the peak to 0
               /      ' .
              /           |       half-way: 2/3 of what that line says
             /            ' .
            /                 ' .     stage two
    0 .... / .....................' .
           0    half of num_steps     num_steps

The float twin takes the same shape with a peak of its own.

Source: the two-stage schedule of "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (March 2024), which
goes from a peak of 1.5e-3 to one of 1e-3 at 700M parameters, and drops weight decay at half-way.
"""

SECOND_STAGE_RATIO = 2 / 3
"""Peak of the second stage over that of the first: 1e-3 / 1.5e-3."""


def learning_rate_at(step: int, num_steps: int, warmup_steps: int, peak_learning_rate: float) -> float:
    """Return the learning rate of a step.

    Args:
        step: counted from 0, below ``num_steps``.
        num_steps: of the whole run.
        warmup_steps: the peak is reached in the last of them.
        peak_learning_rate: the largest value; above 0.
    Returns:
        ``peak · (step + 1) / warmup_steps`` in the warm-up, then ``peak · remaining``, from half-way
        on ``2/3 · peak · remaining``; ``remaining`` falls from 1 to ``1 / (num_steps - warmup_steps)``.
    """
    if step < warmup_steps:
        return peak_learning_rate * (step + 1) / warmup_steps
    remaining = (num_steps - step) / (num_steps - warmup_steps)
    return peak_learning_rate * remaining * (1.0 if _is_first_half(step, num_steps) else SECOND_STAGE_RATIO)


def router_warmup_at(step: int, router_warmup_steps: int) -> float:
    """Return what the routers' learning rate is multiplied by, beside the schedule: it rises to 1 in a line.

    Args:
        step: counted from 0.
        router_warmup_steps: 1 is reached in the last of them; 0 for no warm-up.
    """
    return min(1.0, (step + 1) / router_warmup_steps) if router_warmup_steps else 1.0


def weight_decay_at(step: int, num_steps: int, weight_decay: float) -> float:
    """Return ``weight_decay`` in the first half of the run and 0 in the second.

    Latent weights of a ternary layer mean confidence: decay keeps them near the rounding threshold,
    which helps to explore first, and to settle when it ends.
    """
    return weight_decay if _is_first_half(step, num_steps) else 0.0


def _is_first_half(step: int, num_steps: int) -> bool:
    return 2 * step < num_steps
