"""The folder that one experiment lives in, and where each step puts what it makes.

::

    run/
    ├── data/            token shards, tokenizer.json, summary.json          (data)
    ├── ternary/ float/  checkpoints/, metrics.jsonl, tensorboard/, summary.json, model/   (train)
    │                    settings.json, attempts.jsonl, train.log, report.html, curves.png
    ├── sweep/           a folder a cell, results.jsonl, loss_against_bytes.png   (sweep)
    ├── packed-2bit/ packed-base3/ twin-float16/, and pack.json              (pack)
    ├── placement.json, and place.json for the report                        (place)
    ├── generate.json    context.json    machine.json
    └── report/          report.json, report.html, overview.png              (report)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_bitnet.checkpoint.manifest import MANIFEST_NAME
from moe_bitnet.config import Precision
from moe_bitnet.errors import DataError
from moe_bitnet.files import read_json
from moe_bitnet.packing import Layout
from moe_bitnet.tokenizer import Tokenizer

DEFAULT_RUN = Path("runs/demo")


@dataclass(frozen=True)
class RunFolder:
    """Paths below one folder; nothing is created until a step writes.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def data(self) -> Path:
        """Token shards and tokenizer."""
        return self.path / "data"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file."""
        return self.data / "tokenizer.json"

    @property
    def twin(self) -> Path:
        """The float twin with its matrices in float16."""
        return self.path / "twin-float16"

    def training(self, precision: Precision) -> Path:
        """Return the folder of one training run."""
        return self.path / precision

    def model(self, precision: Precision) -> Path:
        """Return the trained model of one training run."""
        return self.training(precision) / "model"

    def packed(self, layout: Layout) -> Path:
        """Return the packed model in one layout."""
        return self.path / f"packed-{layout}"

    def json_file(self, step: str) -> Path:
        """Return the file with the result of a step."""
        return self.path / f"{step}.json"

    def read_json(self, name: str, step: str) -> dict[str, Any]:
        """Read ``<name>.json``, which a step wrote.

        Raises:
            DataError: the step was not run, or its file is damaged.
        """
        path = self.json_file(name)
        try:
            values = read_json(path)
        except FileNotFoundError as error:
            raise DataError(f"{path}: is missing. Run 'moe-bitnet {step} --run {self.path}' first.") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}). Run 'moe-bitnet {step}' again.") from error
        if not isinstance(values, dict):
            raise DataError(f"{path}: holds no JSON object. Run 'moe-bitnet {step}' again.")
        return values

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer of the run's data.

        Raises:
            DataError: the run has no data, or its tokenizer is damaged.
        """
        if not self.tokenizer.is_file():
            raise DataError(f"{self.data}: holds no token shards. Run 'moe-bitnet data --run {self.path}' first.")
        return Tokenizer.load(self.tokenizer)

    def require_checkpoint(self, folder: Path, command: str) -> Path:
        """Return ``folder`` if it holds a checkpoint.

        Raises:
            DataError: it does not; the message names the command that makes it.
        """
        if not (folder / MANIFEST_NAME).is_file():
            raise DataError(f"{folder}: holds no checkpoint. Run 'moe-bitnet {command} --run {self.path}' first.")
        return folder
