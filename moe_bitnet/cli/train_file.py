"""The settings of a training run as a TOML file: a ``[model]`` and a ``[train]`` table.

::

    [model]                     # fields of ModelConfig but vocab_size, which the data's tokenizer gives
    preset = "demo"             # a shape and its training length; other fields change it
    precision = "ternary"

    [train]                     # fields of TrainConfig
    num_steps = 600

Both tables, every field, and the preset may be left out.
"""

import dataclasses
import inspect
import json
import re
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.training.config import TrainConfig
from moe_bitnet.cli.presets import PRESETS
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import ConfigError

MODEL_FIELDS = tuple(each.name for each in dataclasses.fields(ModelConfig) if each.name != "vocab_size")
TRAIN_FIELDS = tuple(each.name for each in dataclasses.fields(TrainConfig))
_COMMENT_WIDTH = 110


@dataclass(frozen=True)
class TrainFile:
    """What a file gives; an empty one gives nothing.

    Attributes:
        model: fields of ``ModelConfig``, without ``vocab_size``.
        train: fields of ``TrainConfig``.
        preset: name of a shape and training length that the fields change, if any.
        source: what to call the file in an error.
    """

    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    preset: str | None = None
    source: str = "settings"


def read_tables(path: Path, allowed: Mapping[str, tuple[str, ...] | None]) -> dict[str, dict[str, Any]]:
    """Read a TOML file of tables.

    Args:
        path: the file.
        allowed: the keys of each table that there may be; ``None`` for any keys.
    Returns:
        the tables; one that is not in the file is empty.
    Raises:
        ConfigError: the file cannot be read, is not TOML, or holds a table or key that is not allowed.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}). 'moe-bitnet train --write-config' prints a file to begin with."
        ) from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise ConfigError(f"{path}: is not TOML ({error}).") from error
    _refuse_unknown(path, "tables or keys outside of a table", values, tuple(f"[{name}]" for name in allowed), allowed)
    for name, keys in allowed.items():
        table = values.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} is {table!r}; make it a table [{name}].")
        if keys is not None:
            _refuse_unknown(path, f"keys in [{name}]", table, keys, keys)
    return values


def read_train_file(path: Path) -> TrainFile:
    """Read the settings of a training run; values are checked where they are used.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or holds a table, key or preset that there is not.
    """
    tables = read_tables(path, {"model": ("preset", *MODEL_FIELDS), "train": TRAIN_FIELDS})
    model = tables["model"]
    preset = model.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"{path}: preset is {preset!r}; allowed are {', '.join(PRESETS)}.")
    return TrainFile(model, tables["train"], preset, str(path))


def render_train_file(model: dict[str, Any], train: dict[str, Any]) -> str:
    """Write settings as a TOML file in which a comment explains every field.

    Args:
        model: fields of ``ModelConfig``; ``vocab_size`` is left out.
        train: fields of ``TrainConfig``. A field that is ``None`` is written as a comment.
    """
    head = (
        "Settings of a training run, for: moe-bitnet train FILE. What is left out takes its default, and options of "
        "the command line override what is here. Paths are relative to the current folder."
    )
    return "\n".join(
        [
            *_comment(head),
            "",
            "[model]",
            *_comment(f"Instead of the sizes, a preset can be named: preset = one of {', '.join(PRESETS)}."),
            "",
            *_fields(model, MODEL_FIELDS, _explanations(ModelConfig)),
            "[train]",
            *_fields(train, TRAIN_FIELDS, _explanations(TrainConfig)),
        ]
    )


def _refuse_unknown(path: Path, what: str, values: dict[str, Any], shown: tuple[str, ...], known: Any) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{path}: unknown {what}: {', '.join(unknown)}. Allowed are {', '.join(shown)}.")


def _fields(values: dict[str, Any], names: tuple[str, ...], explanations: dict[str, str]) -> list[str]:
    lines: list[str] = []
    for name in names:
        value = values.get(name)
        lines += _comment(explanations.get(name, ""))
        lines += [f"# {name} =" if value is None else f"{name} = {_toml(value)}", ""]
    return lines


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _COMMENT_WIDTH)]


def _toml(value: Any) -> str:
    """Write a number, a truth value or a text; JSON's forms of them are TOML's, too."""
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def _explanations(config: type) -> dict[str, str]:
    """Return the text of each field from the ``Attributes`` of a class's docstring."""
    attributes = inspect.cleandoc(config.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", attributes, flags=re.MULTILINE)
    return {name: " ".join(text.replace("``", "").split()) for name, text in found}
