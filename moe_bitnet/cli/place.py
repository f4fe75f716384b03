"""``moe-bitnet place``: how many devices the FP16 twin and the ternary model need, and start their expert hosts.

Of a run folder, whose placement ``generate`` uses (``--run``); or of any model: a checkpoint (``--model``), a published
shape (``--shape``) or a config file (``--config``), which need not be there and are planned only.
"""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.placement.solver import DEFAULT_MAX_IMBALANCE
from moe_bitnet.checkpoint.native import load_model
from moe_bitnet.cli import arguments, place_devices
from moe_bitnet.cli.console import progress_bar, say
from moe_bitnet.cli.place_devices import DEFAULT_DEVICE_MEMORY, DEFAULT_DEVICES, find_devices
from moe_bitnet.cli.place_model import place_model
from moe_bitnet.cli.place_run import (
    Plan,
    place_run,
    ternary_plan,
)
from moe_bitnet.cli.planning.known_shapes import KNOWN_SHAPES
from moe_bitnet.cli.planning.memory_plan import CACHE_FORMATS
from moe_bitnet.cli.planning.model_shape import WEIGHT_BITS
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.errors import ConfigError
from moe_bitnet.model import MoETransformer
from moe_bitnet.packing import LAYOUTS, Layout
from moe_bitnet.units import format_bytes

HELP = "say how many devices a model needs, FP16 against ternary, and start the expert hosts of a run"
_ONLY_PLANNED = ("context", "shared_bits", "trace", "replicas", "output", "save_topology")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    model = parser.add_argument_group("model (default: that of the run folder)").add_mutually_exclusive_group()
    model.add_argument("--shape", metavar="NAME", help=f"a published shape: {', '.join(KNOWN_SHAPES)}")
    model.add_argument("--model", type=Path, metavar="PATH", help="a checkpoint, or a Hugging Face model folder")
    model.add_argument("--config", type=Path, metavar="FILE", help="a config.json of Hugging Face, or a config of ours")
    place_devices.add_arguments(parser)
    counted = parser.add_argument_group("what is counted beside experts, with a model")
    counted.add_argument(
        "--context", type=arguments.context_len, default=0, metavar="TOKENS", help="a key/value cache, such as 32k"
    )
    counted.add_argument("--kv-format", choices=CACHE_FORMATS, default="FP16", help="of the cache (default: FP16)")
    counted.add_argument(
        "--shared-bits", choices=WEIGHT_BITS, help="of the ternary model's other weights (default: 16, or as packed)"
    )
    routing = parser.add_argument_group("routing, with a model")
    routing.add_argument(
        "--trace", type=Path, metavar="FILE", help="Parquet file: experts visited together share devices"
    )
    routing.add_argument(
        "--max-imbalance",
        type=float,
        default=DEFAULT_MAX_IMBALANCE,
        metavar="X",
        help=f"with --trace: load of a device over the mean, at most (default: {DEFAULT_MAX_IMBALANCE})",
    )
    routing.add_argument(
        "--replicas", action="store_true", help="with --trace: fill free memory with copies of experts"
    )
    parser.add_argument("--placement", type=Path, help="JSON file with a placement of your own for the ternary model")
    parser.add_argument("--layout", choices=LAYOUTS, default="2bit", help="of the ternary model (default: 2bit)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="with a model: write the placement, for --placement"
    )
    parser.add_argument("--no-start", action="store_true", help="of a run: plan only; start no Ray actor")
    parser.add_argument("--address", help="host:port of a running Ray cluster (default: start Ray here)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan a model, or a run; the hosts of a run are started once to see that they hold their experts."""
    if args.shape or args.model or args.config:
        return place_model(args)
    for name in _ONLY_PLANNED:
        if getattr(args, name):
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} goes with --shape, --model or --config. Give one of them, or leave it out.")
    run_folder = RunFolder(args.run)
    if not (args.device or args.device_memory or args.topology or args.discover):
        args.device_memory = DEFAULT_DEVICE_MEMORY
    if args.devices is None and not (args.topology or args.discover):
        args.devices = DEFAULT_DEVICES
    with ExitStack() as stack:
        config = ClusterConfig(address=args.address)
        if args.discover:  # the nodes that are found must be those on which hosts start
            stack.enter_context(_connect(config))
        result = place_run(run_folder, find_devices(args).topology, args.layout, args.placement)
        if not args.no_start:
            stack.enter_context(_connect(config))
            try_hosts(run_folder, args.layout, config)
    return result


def _connect(config: ClusterConfig) -> Any:
    from cluster.runtime import connect  # imports Ray, which planning does without

    return connect(config)


def try_hosts(run_folder: RunFolder, layout: Layout, config: ClusterConfig) -> None:
    """Start the ternary model's hosts once, to see that they hold their experts; needs a connected Ray."""
    with started_hosts(load_model(run_folder.packed(layout)), ternary_plan(run_folder), config):
        say("all hosts hold their experts; they stop now, and generating starts them again")


@contextmanager
def started_hosts(model: MoETransformer, plan: Plan, config: ClusterConfig) -> Iterator[Any]:
    """Start the plan's expert hosts and put them in the place of the model's own experts."""
    from cluster.runtime import start_expert_hosts  # imports Ray, which planning does without

    with ExitStack() as stack:
        with progress_bar("load experts", sum(plan.placement.bytes_per_device) - plan.problem.home_bytes) as bar:
            loaded_bytes: dict[str, int] = {}

            def on_progress(name: str, loaded: int, total: int) -> None:
                loaded_bytes[name] = loaded
                bar.update(sum(loaded_bytes.values()), f"{name}: {format_bytes(loaded)} of {format_bytes(total)}")

            hosts = start_expert_hosts(model, plan.problem, plan.placement, config, on_progress=on_progress)
            running = stack.enter_context(hosts)
        model.replace_experts(running.executors)
        yield running
