"""A made-up but plausible run folder; every number in it is written down here or follows from a seed."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROMPT = "The harbour was quiet <script>alert('prompt')</script> & the"
TEXT = ' lamps "were" lit <img src=x onerror=alert(1)> one by one.\nThe tide had turned, and the boats lay still.'


def write_sample_run(folder: Path) -> Path:
    """Write a complete run into ``folder`` and return it."""
    for name, value in sample_files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    for name, offset in (("ternary", 0.06), ("float", 0.0)):
        lines = "".join(json.dumps(line) + "\n" for line in history(offset))
        (folder / name / "metrics.jsonl").write_text(lines)
    return folder


def history(offset: float, num_steps: int = 600) -> list[dict[str, Any]]:
    random.seed(7)
    lines: list[dict[str, Any]] = []
    for step in range(10, num_steps + 1, 10):
        loss = 2.95 + offset + 5.4 * math.exp(-step / 90)
        seen = {"step": step, "tokens": step * 8192, "elapsed_s": step * 0.9}
        lines.append(
            {
                **seen,
                "loss": loss + random.gauss(0, 0.05),
                "load_balance_loss": 1.02,
                "router_z_loss": 0.4,
                "learning_rate": 0.003,
                "tokens_per_s": 9100.0,
                "expert_load_cv": 0.12,
            }
        )
        if step % 50 == 0:
            lines.append({**seen, "validation_loss": loss + 0.09, "validation_ppl": math.exp(loss + 0.09)})
    return lines


def sample_files() -> dict[str, Any]:
    random.seed(3)
    load = []
    for _ in range(4):
        shares = [1 + random.gauss(0, 0.18) for _ in range(8)]
        load.append([share / sum(shares) for share in shares])
    model = {
        "num_parameters": 8_421_376,
        "num_active_parameters": 3_112_960,
        "num_expert_parameters": 6_291_456,
        "num_steps": 600,
        "num_tokens": 4_915_200,
        "peak_learning_rate": 0.003,
        "expert_load": load,
        "is_compiled": True,
        "config": {"num_layers": 4, "num_experts": 8, "top_k": 2, "hidden_size": 256},
    }
    return {
        "data/summary.json": {
            "source": "Python documentation, 3.11",
            "num_train_documents": 1840,
            "num_validation_documents": 96,
            "train_bytes": 24_117_248,
            "validation_bytes": 1_310_720,
            "num_train_tokens": 6_815_744,
            "num_validation_tokens": 370_688,
            "vocab_size": 8192,
            "end_of_text_id": 0,
            "seed": 0,
            "validation_fraction": 0.05,
            "bytes_per_token": 3.538,
            "unknown_key": "is not shown",
        },
        "ternary/summary.json": {
            **model, "precision": "ternary", "train_s": 566.2, "tokens_per_s": 8680.0,
            "validation_loss": 3.107, "validation_ppl": 22.35, "validation_bits_per_byte": 1.267,
        },
        "float/summary.json": {
            **model, "precision": "float", "train_s": 531.9, "tokens_per_s": 9240.0,
            "validation_loss": 3.047, "validation_ppl": 21.05, "validation_bits_per_byte": 1.243,
        },
        "pack.json": {
            "layouts": [
                packed_layout("2bit", 5_872_640, 1_576_960, 2.005),
                packed_layout("base3", 5_562_368, 1_266_688, 1.611),
            ],
            "fp16_file_bytes": 16_877_056,
            "fp16_expert_bytes": 12_582_912,
            "max_abs_logit_difference": 0.0021,
            "max_abs_logit": 14.6,
        },
        "place.json": {
            "devices": [
                {"name": f"device-{index}", "memory_bytes": 4 << 20, "reserved_bytes": 512 << 10} for index in range(4)
            ],
            "float16": {"num_devices": 4, "lower_bound": 4, "expert_bytes": 393_216, "total_bytes": 12_582_912},
            "ternary": {"num_devices": 1, "lower_bound": 1, "expert_bytes": 49_280, "total_bytes": 1_576_960},
            "layout": "2bit",
        },
        "generate.json": {
            "prompt": PROMPT,
            "text": TEXT,
            "num_new_tokens": 48,
            "tokens_equal_single_process": True,
            "runs": [
                traffic_run("float16 twin", 4, "float16", "float16", 6528.0, 6144.0, 2.9),
                traffic_run("ternary", 1, "int8", "float16", 0.0, 0.0, 1.4),
                traffic_run("ternary, spread", 4, "int8", "float16", 4996.0, 4640.0, 2.6),
            ],
        },
        "context.json": {
            "budget_bytes": 8 << 20,
            "model": "ternary",
            "trained_seq_len": 256,
            "common_num_tokens": 2048,
            "formats": [
                cache_format("fp16", 16.0, 2048, 4096.0, 26.41, 26.41),
                cache_format("8-bit", 8.25, 3904, 2148.0, 26.42, 31.08),
                cache_format("4-bit", 4.5, 7360, 1139.0, 26.63, 44.92),
            ],
        },
        "machine.json": {
            "cpu": "Example CPU @ 2.4 GHz",
            "num_cores": 2,
            "memory_bytes": 8 << 30,
            "python": "3.11.7",
            "versions": {"moe-bitnet": "0.1.0", "torch": "2.13.0", "ray": "2.60.0"},
            "commit": "0123abcd",
            "date": "2026-11-02",
            "demo_s": 1284.0,
            "steps_s": {"data": 31.5, "train-ternary": 566.2, "train-float": 531.9, "pack": 2.1, "generate": 88.0},
        },
    }  # fmt: skip


def packed_layout(layout: str, file_bytes: int, expert_bytes: int, bits: float) -> dict[str, Any]:
    return {
        "layout": layout,
        "file_bytes": file_bytes,
        "expert_bytes": expert_bytes,
        "bits_per_expert_weight": bits,
    }


def traffic_run(
    name: str, num_devices: int, dispatch: str, combine: str, bytes_per_token: float, formula: float, seconds: float
) -> dict[str, Any]:
    num_tokens = 64
    total = int(bytes_per_token * num_tokens)
    return {
        "name": name,
        "num_devices": num_devices,
        "dispatch": dispatch,
        "combine": combine,
        "num_tokens": num_tokens,
        "dispatch_bytes": total * 45 // 100,
        "combine_bytes": total * 50 // 100,
        "metadata_bytes": total * 5 // 100,
        "header_bytes": 0 if total == 0 else 9216,
        "bytes_per_token": bytes_per_token,
        "formula_bytes_per_token": formula,
        "seconds": seconds,
        "tokens_equal_single_process": True,
    }


def cache_format(
    name: str, bits: float, num_tokens: int, bytes_per_token: float, ppl_common: float, ppl_all: float
) -> dict[str, Any]:
    return {
        "format": name,
        "effective_bits": bits,
        "num_tokens": num_tokens,
        "allocated_bytes": int(num_tokens * bytes_per_token),
        "bytes_per_token": bytes_per_token,
        "ppl_common": ppl_common,
        "ppl_all": ppl_all,
    }


@pytest.fixture
def write_run() -> Callable[[Path], Path]:
    return write_sample_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_sample_run(tmp_path / "run")
