"""The loss of the first 20 steps of each precision, against curves that are kept beside this file.

A change of the model, the recipe or the order of batches shows here first. To accept one that is meant:
``MOE_BITNET_WRITE_GOLDEN=1 pytest tests/cluster/training/test_golden_curves.py``, and say why in the commit.
"""

import json
import os
from pathlib import Path
from typing import get_args

import pytest
import torch

from cluster.training.run import build_torch_engine, run_training
from moe_bitnet.config import Precision
from moe_bitnet.files import read_json, write_json_atomically

GOLDEN = Path(__file__).with_name("golden_curves.json")
NUM_STEPS = 20
# Other instructions add up in another order, and rounding makes steps of what were ulps: among eight starts whose
# weights were moved by 1e-6 of their size, losses differed by at most 0.0078, 1.4e-6, 0.0011 and 0.0089 nats.
SPREAD = {"ternary": 0.01, "float": 1e-5, "int4-experts": 0.002, "binary": 0.01}


@pytest.mark.parametrize("precision", get_args(Precision))
def test_the_first_steps_follow_the_golden_curve(model_config, config, precision):
    config = config.replace(num_steps=NUM_STEPS, batch_size=8, peak_learning_rate=4e-3, eval_every_steps=NUM_STEPS)
    run_training(model_config.replace(precision=precision), config, build_torch_engine(config), torch.device("cpu"))
    lines = [json.loads(line) for line in (config.out_folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    if os.environ.get("MOE_BITNET_WRITE_GOLDEN"):
        curves = read_json(GOLDEN) if GOLDEN.is_file() else {}
        write_json_atomically(GOLDEN, {**curves, precision: [round(loss, 6) for loss in losses]})
    golden = read_json(GOLDEN)[precision]
    assert len(losses) == NUM_STEPS
    assert losses[0] - losses[-1] > 0.5
    assert losses == pytest.approx(golden, abs=SPREAD[precision])
