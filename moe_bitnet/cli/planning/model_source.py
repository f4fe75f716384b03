"""Where ``--model`` points to: a known name, a Hugging Face model, or a checkpoint of this project."""

from dataclasses import dataclass
from pathlib import Path

from moe_bitnet.checkpoint.native import CONFIG_NAME, FORMAT, TENSORS_NAME, read_info
from moe_bitnet.cli.planning.hugging_face import shape_from_config
from moe_bitnet.cli.planning.known_shapes import KNOWN_SHAPES
from moe_bitnet.cli.planning.model_shape import ModelShape
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ConfigError
from moe_bitnet.files import read_json


@dataclass(frozen=True)
class ModelSource:
    """A model's shape, and what its weights take.

    Attributes:
        name: for people.
        shape: sizes.
        file_bytes: of the tensor files beside its config; 0 if there are none.
        config: of a model of this project, whose tensors can be weighed exactly; ``None`` of others.
    """

    name: str
    shape: ModelShape
    file_bytes: int = 0
    config: ModelConfig | None = None

    def weights(self, weight_bits: str | None) -> tuple[int, str]:
        """Return the bytes of the weights, and where that number is from.

        Args:
            weight_bits: a key of ``WEIGHT_BITS``; ``None`` takes the files as they are, or 16 bits without any.
        """
        if weight_bits is None and self.file_bytes:
            return self.file_bytes, "as in its files"
        weight_bits = weight_bits or "16"
        bits = f"{weight_bits} bits" if weight_bits.isdigit() else f"ternary {weight_bits}"
        return self.shape.weight_bytes(weight_bits), "16 bits" if weight_bits == "16" else f"{bits}, tables 16 bits"


def find_model(model: str, has_cache: bool = True) -> ModelSource:
    """Look up a model.

    Args:
        model: a key of ``KNOWN_SHAPES``; or the path of a Hugging Face model folder, its ``config.json``, a checkpoint
            of this project, its model config as a file, or a run folder (its 2-bit model, or the first other one
            there is).
        has_cache: whether tokens will be cached (:func:`shape_from_config`).
    Raises:
        ConfigError: nothing is there, or the model is not supported.
    """
    if model.lower() in KNOWN_SHAPES:
        return ModelSource(model.lower(), KNOWN_SHAPES[model.lower()])
    path = Path(model)
    config_file = path if path.is_file() else _config_file(path)
    if config_file is None:
        raise ConfigError(
            f"{model}: is neither a known name nor a folder with config.json. Names are {', '.join(KNOWN_SHAPES)}."
        )
    try:
        values = read_json(config_file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config_file}: cannot be read ({error}). Give the config.json of a model.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{config_file}: holds no JSON object. Give the config.json of a model.")
    folder = config_file.parent
    if values.get("format") == FORMAT:
        tensors = folder / TENSORS_NAME
        config = read_info(folder).config
        file_bytes = tensors.stat().st_size if tensors.is_file() else 0
        return ModelSource(str(folder), _own_shape(config), file_bytes, config)
    if "num_layers" in values and "num_hidden_layers" not in values:  # our names: a config for training
        config = ModelConfig.from_dict(values, str(config_file))
        return ModelSource(str(config_file), _own_shape(config), config=config)
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return ModelSource(str(folder), shape_from_config(values, str(config_file), has_cache), file_bytes)


def _config_file(folder: Path) -> Path | None:
    run = RunFolder(folder)
    folders = [folder, run.packed("2bit"), run.packed("base3"), run.model("ternary"), run.twin, run.model("float")]
    return next((each / CONFIG_NAME for each in folders if (each / CONFIG_NAME).is_file()), None)


def _own_shape(config: ModelConfig) -> ModelShape:
    return ModelShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        num_experts=config.num_experts,
        top_k=config.top_k,
        shared_intermediate_size=config.num_shared_experts * config.intermediate_size,
        has_tied_embeddings=config.has_tied_embeddings,
        max_seq_len=config.max_seq_len,
    )
