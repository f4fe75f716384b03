"""What a finished run leaves: ``<out>/model/`` and ``<out>/summary.json``."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.training.evaluation import Evaluation
from cluster.training.state import TrainingState
from moe_bitnet.checkpoint.manifest import write_manifest
from moe_bitnet.checkpoint.native import write_model
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import CheckpointError
from moe_bitnet.files import replace_directory, write_json_atomically
from moe_bitnet.model import MoETransformer

MODEL_FOLDER = "model"
SUMMARY_NAME = "summary.json"
SETTINGS_NAME = "settings.json"
"""Model and training settings that a run was started with."""


@dataclass(frozen=True)
class TrainingSummary:
    """The headline numbers of a run; the fields of ``summary.json``.

    Attributes:
        precision: of the model's config.
        num_parameters: all of them; an embedding that is tied to the head counts once.
        num_active_parameters: those that one token uses: all, less the routed experts it does not visit. The
            whole embedding is included, once.
        num_expert_parameters: those of all experts, routed and shared.
        num_steps: of the run.
        num_tokens: seen in training.
        train_s: seconds in the loop, over all attempts.
        tokens_per_s: of training steps, without the compiling ones, evaluation and checkpoints.
        peak_learning_rate: of the schedule.
        validation_loss: nats a token after the last step.
        validation_ppl: its exponential.
        validation_bits_per_byte: the same in bits a byte of text.
        expert_load: ``[num_layers][num_experts]``, shares of the visits over the validation windows.
        is_compiled: whether ``torch.compile`` was used.
        config: the model's fields.
    """

    precision: str
    num_parameters: int
    num_active_parameters: int
    num_expert_parameters: int
    num_steps: int
    num_tokens: int
    train_s: float
    tokens_per_s: float
    peak_learning_rate: float
    validation_loss: float
    validation_ppl: float
    validation_bits_per_byte: float
    expert_load: tuple[tuple[float, ...], ...]
    is_compiled: bool
    config: dict[str, Any]


def summarize(
    model: MoETransformer,
    state: TrainingState,
    evaluation: Evaluation,
    peak_learning_rate: float,
    bytes_per_token: float,
    is_compiled: bool,
) -> TrainingSummary:
    """Gather the numbers of a run that is done."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return TrainingSummary(
        precision=model.config.precision,
        num_parameters=num_parameters,
        num_active_parameters=num_parameters - inactive_parameters(model.config),
        num_expert_parameters=expert_parameters(model.config),
        num_steps=state.step,
        num_tokens=state.num_tokens,
        train_s=round(state.train_s, 3),
        tokens_per_s=round(state.tokens_per_s, 1),
        peak_learning_rate=peak_learning_rate,
        validation_loss=evaluation.loss,
        validation_ppl=evaluation.perplexity,
        validation_bits_per_byte=evaluation.bits_per_byte(bytes_per_token),
        expert_load=evaluation.expert_load,
        is_compiled=is_compiled,
        config=model.config.to_dict(),
    )


def expert_parameters(config: ModelConfig) -> int:
    """Return the parameters of all experts of all layers, routed and shared."""
    routed = config.num_experts * config.expert_parameters
    return config.num_layers * (routed + config.num_shared_experts * config.shared_expert_parameters)


def inactive_parameters(config: ModelConfig) -> int:
    """Return the parameters of the routed experts that one token does not visit."""
    return config.num_layers * (config.num_experts - config.top_k) * config.expert_parameters


def write_results(
    out_folder: Path, model: MoETransformer, summary: TrainingSummary, data_folder: Path
) -> dict[str, Any]:
    """Write the trained model, with the tokenizer beside it, and the summary.

    Returns:
        what ``summary.json`` holds.
    Raises:
        CheckpointError: the files cannot be written.
    """
    values = asdict(summary)
    values["expert_load"] = [list(layer) for layer in summary.expert_load]
    try:
        with replace_directory(out_folder / MODEL_FOLDER) as folder:
            write_model(model, folder)
            tokenizer = data_folder / "tokenizer.json"
            if tokenizer.exists():
                shutil.copyfile(tokenizer, folder / tokenizer.name)
            write_manifest(folder)
        write_json_atomically(out_folder / SUMMARY_NAME, values)
    except OSError as error:
        raise CheckpointError(
            f"{out_folder}: the trained model cannot be written ({error}). Free some disk space; "
            f"the same command writes it from the last checkpoint."
        ) from error
    return values
