"""``moe-bitnet demo``: the main job, end to end, at a small size.

Each step is a subcommand of its own. Run it again after an interruption: shards of
the standard library that are there are used again, and training goes on from its
last checkpoint.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.topology import logical_devices
from moe_bitnet.cli import (
    arguments,
    context,
    context_run,
    data,
    generate,
    pack,
    place,
    place_devices,
    place_run,
    report,
    train,
    train_settings,
)
from moe_bitnet.cli.console import console, say
from moe_bitnet.cli.local_generation import Request
from moe_bitnet.cli.machine import describe_machine
from moe_bitnet.cli.presets import PRESETS
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.config import Precision
from moe_bitnet.errors import DataError
from moe_bitnet.files import write_json_atomically
from moe_bitnet.units import parse_memory

DEMO_PRECISIONS: tuple[Precision, ...] = ("ternary", "float")

HELP = "the whole job at a small size: data, train, pack, place, generate, context, report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--data", nargs="+", type=Path, default=[], metavar="PATH", help="text (default: the standard library)"
    )
    parser.add_argument("--size", choices=sorted(PRESETS), default="demo", help="shape and length (default: demo)")
    parser.add_argument("--max-mb", type=arguments.megabytes, help="use at most this many MB of text")
    parser.add_argument("--device-memory", default=place_devices.DEFAULT_DEVICE_MEMORY, help="of each logical device")
    parser.add_argument("--memory", default=context.DEFAULT_BUDGET, help="budget of each key/value cache")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    parser.add_argument("--address", help="host:port of a running Ray cluster (default: start Ray here)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Walk all steps; returns the report."""
    run_folder, preset, clock = RunFolder(args.run), PRESETS[args.size], StepClock()
    cluster_config = ClusterConfig(address=args.address)
    device_memory, cache_memory = parse_memory(args.device_memory), parse_memory(args.memory)
    with clock.step("data"):
        _build_data_once(run_folder, args, preset.vocab_size)
    tokenizer = run_folder.load_tokenizer()
    topology = logical_devices(place_devices.DEFAULT_DEVICES, device_memory)
    # found now rather than after the training
    place_run.solve_both(preset.model_config(tokenizer.vocab_size, "ternary"), topology, "2bit")
    from cluster.runtime import connect  # imports Ray: only now, so that bad input is found before it starts

    with connect(cluster_config):
        for precision in DEMO_PRECISIONS:
            with clock.step(f"train {precision}"):
                train.train_run(
                    preset.model_config(tokenizer.vocab_size, precision),
                    train_settings.preset_train_config(run_folder, preset, precision, is_compiled=not args.no_compile),
                    cluster_config,
                )
        with clock.step("pack"):
            pack.pack_run(run_folder, None)
        with clock.step("place"):
            place_run.place_run(run_folder, topology, "2bit")
            place.try_hosts(run_folder, "2bit", cluster_config)
        with clock.step("generate"):
            request = Request(
                tokenizer.encode(generate.DEFAULT_PROMPT), max_new_tokens=48, temperature=0.8, seed=0, kv_bits=16
            )
            generate.generate_run(run_folder, tokenizer, generate.DEFAULT_PROMPT, request, cluster_config)
    with clock.step("context"):
        context_run.fill_caches(run_folder, cache_memory, "2bit")
    machine = {**describe_machine(), "demo_s": clock.total_s, "steps_s": clock.steps_s}
    write_json_atomically(run_folder.json_file("machine"), machine)
    return report.report_run(run_folder, is_quiet=args.json)


class StepClock:
    """Announces each step and keeps its seconds."""

    def __init__(self) -> None:
        self.steps_s: dict[str, float] = {}

    @property
    def total_s(self) -> float:
        """Seconds of all steps."""
        return sum(self.steps_s.values())

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step."""
        console.rule(f"[bold]{name}", align="left")
        start = time.perf_counter()
        yield
        self.steps_s[name] = round(time.perf_counter() - start, 1)
        say(f"{name} took {self.steps_s[name]:.1f} s")


def _build_data_once(run_folder: RunFolder, args: argparse.Namespace, vocab_size: int) -> None:
    """Build the shards, unless this run has those of the standard library with this vocabulary."""
    if run_folder.data.is_dir() and not args.data and args.max_mb is None:
        try:
            summary = data.summarize(run_folder)
        except DataError as error:
            say(f"building the data anew: {error}")
        else:
            if summary["source"].endswith("standard library") and summary["vocab_size"] == vocab_size:
                say(f"using {run_folder.data} as it is ({summary['num_train_tokens']} training tokens)")
                return
    data.build_data(run_folder, args.data, vocab_size, max_bytes=args.max_mb)
