"""A training run as Ray metrics, which Ray offers to Prometheus on every node; each has the tag ``run``.

moe_bitnet_training_step, _loss, _validation_loss, _learning_rate, _tokens_per_s, _gradient_norm, _dispatch_bytes,
_expert_load_cv, _idle_experts; and moe_bitnet_training_expert_load_max, which has the tag ``layer``, too.
"""

from ray.util.metrics import Gauge

from cluster.training.metrics import Line

_DESCRIPTIONS = {
    "step": "Optimizer steps that are done.",
    "loss": "Mean cross entropy of the last step, nats a token.",
    "validation_loss": "Cross entropy of the last evaluation, nats a token.",
    "learning_rate": "Learning rate of the last step.",
    "tokens_per_s": "Speed of the last step, over all workers.",
    "gradient_norm": "Norm of the last gradient, before clipping.",
    "dispatch_bytes": "Bytes that workers sent to each other's experts and back, in the last step.",
    "expert_load_cv": "Standard deviation over mean of the experts' loads, averaged over layers.",
    "num_idle_experts": "Experts without a token in the last step.",
}


class TrainingGauges:
    """Passes on the lines of a run's metrics.

    Args:
        run: name of the run.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges = {
            name: Gauge(f"moe_bitnet_training_{name.removeprefix('num_')}", text, tag_keys=("run",))
            for name, text in _DESCRIPTIONS.items()
        }
        self._load = Gauge(
            "moe_bitnet_training_expert_load_max",
            "Load of a layer's busiest expert in the last step, as a multiple of the even share.",
            tag_keys=("run", "layer"),
        )

    def tell(self, line: Line) -> None:
        """Pass on a line of ``metrics.jsonl``."""
        for name, gauge in self._gauges.items():
            if name in line:
                gauge.set(float(line[name]), {"run": self._run})
        for layer, load in enumerate(line.get("expert_load_max", ())):
            self._load.set(load, {"run": self._run, "layer": str(layer)})
