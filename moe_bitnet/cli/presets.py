"""Model shapes and training lengths that fit a machine, by name."""

from dataclasses import dataclass
from typing import Any

from moe_bitnet.config import ModelConfig, Precision


@dataclass(frozen=True)
class Preset:
    """A model shape with a training length.

    Attributes:
        shape: fields of :class:`moe_bitnet.ModelConfig` except vocabulary and precision.
        vocab_size: tokens of the tokenizer.
        num_steps: optimizer steps.
        batch_size: sequences a step.
        seq_len: tokens a sequence.
        warmup_steps: steps of rising learning rate.
        peak_learning_rates: by precision; each has its own best.
    """

    shape: dict[str, Any]
    vocab_size: int
    num_steps: int
    batch_size: int
    seq_len: int
    warmup_steps: int
    peak_learning_rates: dict[Precision, float]

    def model_config(self, vocab_size: int, precision: Precision) -> ModelConfig:
        """Return the shape with a tokenizer's vocabulary and a precision."""
        return ModelConfig(vocab_size=vocab_size, precision=precision, max_seq_len=self.seq_len, **self.shape)


def _rates(bits: float, floats: float) -> dict[Precision, float]:
    """Return peak learning rates: those swept for ternary and float serve binary and int4 experts, too."""
    return {"ternary": bits, "binary": bits, "float": floats, "int4-experts": floats}


def _shape(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": 2,
        "head_dim": head_dim,
        "num_experts": 8,
        "top_k": 2,
    }


PRESETS = {
    # for tests: seconds, learns next to nothing
    "tiny": Preset(
        _shape(32, 32, 2, 2, 16),
        vocab_size=512,
        num_steps=20,
        batch_size=2,
        seq_len=64,
        warmup_steps=4,
        peak_learning_rates=_rates(8e-3, 4e-3),
    ),
    # for the demo: some minutes on two cores; 8 million parameters, 3 million active.
    # The rates are the best of a sweep at this very length (docs/experiments.md).
    "demo": Preset(
        _shape(192, 384, 4, 4, 64),
        vocab_size=4096,
        num_steps=600,
        batch_size=8,
        seq_len=256,
        warmup_steps=30,
        peak_learning_rates=_rates(4e-3, 2e-3),
    ),
    # an hour or more on two cores; 22 million parameters, 8 million active; rates not swept
    "small": Preset(
        _shape(256, 512, 6, 4, 64),
        vocab_size=8192,
        num_steps=4000,
        batch_size=8,
        seq_len=512,
        warmup_steps=200,
        peak_learning_rates=_rates(4e-3, 2e-3),
    ),
}
