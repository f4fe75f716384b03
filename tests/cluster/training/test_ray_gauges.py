from functools import partial

from cluster.training import ray_gauges
from cluster.training.ray_gauges import TrainingGauges


class Gauge:
    """Keeps what Ray's gauge is told."""

    def __init__(self, made, name, description, tag_keys=()):
        assert description
        self.tag_keys, self.values = tag_keys, {}
        made[name] = self

    def set(self, value, tags):
        assert isinstance(value, float)
        assert set(tags) == set(self.tag_keys)
        self.values[tuple(tags.values())] = value


def test_gauges_follow_the_lines(monkeypatch):
    made = {}
    monkeypatch.setattr(ray_gauges, "Gauge", partial(Gauge, made))
    gauges = TrainingGauges("demo")
    gauges.tell({"step": 1, "loss": 3.0, "learning_rate": 0.1, "num_idle_experts": 2, "expert_load_max": [1.5, 2.0]})
    gauges.tell({"step": 2, "validation_loss": 2.5})
    values = {name: gauge.values for name, gauge in made.items() if gauge.values}
    assert values == {
        "moe_bitnet_training_step": {("demo",): 2.0},
        "moe_bitnet_training_loss": {("demo",): 3.0},
        "moe_bitnet_training_learning_rate": {("demo",): 0.1},
        "moe_bitnet_training_idle_experts": {("demo",): 2.0},
        "moe_bitnet_training_expert_load_max": {("demo", "0"): 1.5, ("demo", "1"): 2.0},
        "moe_bitnet_training_validation_loss": {("demo",): 2.5},
    }
