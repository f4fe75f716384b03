"""A run folder as the steps leave it, with random weights in place of trained ones."""

import random

import pytest
import torch

from moe_bitnet.checkpoint.native import save_model
from moe_bitnet.cli.data import build_data
from moe_bitnet.cli.presets import PRESETS
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.model import MoETransformer
from moe_bitnet.tokenizer import Tokenizer


def write_text(folder, num_files=12):
    """Text files of made-up words, about 8 kB each."""
    folder.mkdir(parents=True)
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 7))) for _ in range(300)]
    for index in range(num_files):
        text = " ".join(generator.choices(words, k=1500)) + "\n"
        (folder / f"{index:02d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "files")


@pytest.fixture(scope="session")
def filled_run(tmp_path_factory, text_folder):
    """Data and both models, for tests that only read; those that write copy it."""
    run_folder = RunFolder(tmp_path_factory.mktemp("runs") / "filled")
    build_data(run_folder, [text_folder], vocab_size=320)
    vocab_size = Tokenizer.load(run_folder.tokenizer).vocab_size
    for precision in ("ternary", "float"):
        torch.manual_seed(0)
        model = MoETransformer(PRESETS["tiny"].model_config(vocab_size, precision))
        save_model(model, run_folder.model(precision))
    return run_folder
