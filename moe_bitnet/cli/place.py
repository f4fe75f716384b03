"""``moe-bitnet place``: how many devices the FP16 twin and the ternary model need, and start their expert hosts."""

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.solver import solve_placement
from cluster.topology import MAX_LOGICAL_DEVICES, Topology, logical_devices
from moe_bitnet.checkpoint.manifest import verify_manifest
from moe_bitnet.checkpoint.native import load_model, read_info
from moe_bitnet.checkpoint.sizes import model_sizes
from moe_bitnet.cli.console import progress_bar, say
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import DataError, PlacementError
from moe_bitnet.files import write_json_atomically
from moe_bitnet.model import MoETransformer
from moe_bitnet.packing import LAYOUTS, Layout, check_layout
from moe_bitnet.units import format_bytes, parse_memory

HELP = "say how many devices the FP16 twin and the ternary model need, and start the expert hosts"
DEFAULT_DEVICES = 8
DEFAULT_DEVICE_MEMORY = "5.5MB"


@dataclass(frozen=True)
class Plan:
    """A model on devices.

    Attributes:
        problem: sizes and devices.
        placement: device of every expert.
    """

    problem: PlacementProblem
    placement: Placement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--devices", type=int, default=DEFAULT_DEVICES, help=f"equal devices (default: {DEFAULT_DEVICES})"
    )
    parser.add_argument(
        "--device-memory",
        default=DEFAULT_DEVICE_MEMORY,
        metavar="SIZE",
        help=f"usable memory of each, such as 24GB or 512MiB (default: {DEFAULT_DEVICE_MEMORY}, which suits the demo)",
    )
    parser.add_argument(
        "--topology", type=Path, help="JSON file with devices of different sizes, instead of the two above"
    )
    parser.add_argument("--placement", type=Path, help="JSON file with a placement of your own for the ternary model")
    parser.add_argument("--layout", choices=LAYOUTS, default="2bit", help="of the ternary model (default: 2bit)")
    parser.add_argument("--no-start", action="store_true", help="plan only; start no Ray actor")
    parser.add_argument("--address", help="host:port of a running Ray cluster (default: start Ray here)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan, and start the ternary model's hosts once to see that they hold their experts."""
    run_folder = RunFolder(args.run)
    topology = (
        Topology.from_json(args.topology)
        if args.topology
        else logical_devices(args.devices, parse_memory(args.device_memory))
    )
    result = place_run(run_folder, topology, args.layout, args.placement)
    if not args.no_start:
        from cluster.runtime import connect  # imports Ray, which planning does without

        config = ClusterConfig(address=args.address)
        with connect(config):
            try_hosts(run_folder, args.layout, config)
    return result


def solve_both(
    config: ModelConfig, topology: Topology, layout: Layout, own_placement: Path | None = None
) -> tuple[Plan, Plan]:
    """Place the FP16 twin and the ternary model of one shape.

    Raises:
        PlacementError: the ternary model does not fit on the devices, or the twin on none of any number.
    """
    problem = _problem(config, layout, topology)
    placement = solve_placement(problem) if own_placement is None else Placement.from_json(own_placement, problem)
    return _solve_twin(config, topology), Plan(problem, placement)


def try_hosts(run_folder: RunFolder, layout: Layout, config: ClusterConfig) -> None:
    """Start the ternary model's hosts once, to see that they hold their experts; needs a connected Ray."""
    with started_hosts(load_model(run_folder.packed(layout)), ternary_plan(run_folder), config):
        say("all hosts hold their experts; they stop now, and generating starts them again")


def place_run(
    run_folder: RunFolder, topology: Topology, layout: Layout, own_placement: Path | None = None
) -> dict[str, Any]:
    """Solve the placement of both models and write it down; returns what the report shows."""
    source = run_folder.require_checkpoint(run_folder.packed(layout), "pack")
    verify_manifest(source)
    config = read_info(source).config
    twin, ternary = solve_both(config, topology, layout, own_placement)
    result: dict[str, Any] = {
        "devices": [dataclasses.asdict(device) for device in topology.devices],
        "layout": layout,
        "float16": _describe(twin),
        "ternary": _describe(ternary),
    }
    for name, plan in (("FP16 twin", twin), (f"ternary {layout}", ternary)):
        placement, problem = plan.placement, plan.problem
        say(
            f"{name}: {format_bytes(problem.total_bytes)} on {placement.num_devices} device(s) of "
            f"{topology.num_devices} given (lower bound {placement.lower_bound}); "
            f"one expert has {format_bytes(problem.expert_bytes)}"
        )
    write_json_atomically(
        run_folder.json_file("placement"),
        {
            "float16": {"problem": twin.problem.to_dict(), "placement": twin.placement.to_dict()},
            "ternary": {"problem": ternary.problem.to_dict(), "placement": ternary.placement.to_dict()},
            "layout": layout,
        },
    )
    write_json_atomically(run_folder.json_file("place"), result)
    return result


def placed_layout(run_folder: RunFolder) -> Layout:
    """Return the layout of the ternary model that ``place`` placed.

    Raises:
        DataError: ``place`` was not run, or its file is damaged.
    """
    layout = run_folder.read_json("placement", "place").get("layout")
    if layout not in LAYOUTS:
        raise DataError(f"{run_folder.json_file('placement')}: names no layout. Run 'moe-bitnet place' again.")
    return check_layout(layout)


def ternary_plan(run_folder: RunFolder) -> Plan:
    """Read the ternary model's placement that ``place`` wrote."""
    return _read_plan(run_folder, "ternary")


def twin_plan(run_folder: RunFolder) -> Plan:
    """Read the FP16 twin's placement that ``place`` wrote."""
    return _read_plan(run_folder, "float16")


def spread_plan(plan: Plan, num_devices: int) -> Plan:
    """Spread a model evenly over more devices than it needs."""
    return Plan(plan.problem, solve_placement(plan.problem, num_devices=num_devices))


@contextmanager
def started_hosts(model: MoETransformer, plan: Plan, config: ClusterConfig) -> Iterator[Any]:
    """Start the plan's expert hosts and put them in the place of the model's own experts."""
    from cluster.runtime import start_expert_hosts  # imports Ray, which planning does without

    with ExitStack() as stack:
        with progress_bar("start hosts", plan.placement.num_devices) as bar:
            ready = 0

            def on_host_ready(name: str, held_bytes: int) -> None:
                nonlocal ready
                ready += 1
                bar.update(ready, f"{name} holds {format_bytes(held_bytes)} of experts")

            hosts = start_expert_hosts(model, plan.problem, plan.placement, config, on_host_ready)
            running = stack.enter_context(hosts)
        model.replace_experts(running.executors)
        yield running


def _solve_twin(config: ModelConfig, topology: Topology) -> Plan:
    """Place the FP16 twin; if the devices are equal and too few, on as many of them as it would need."""
    twin_config = config.replace(precision="float")
    problem = _problem(twin_config, None, topology)
    try:
        return Plan(problem, solve_placement(problem))
    except PlacementError as error:
        memory = {device.usable_bytes for device in topology.devices}
        too_small = PlacementError(f"FP16 twin: {error}")
        if len(memory) > 1:
            raise too_small from error
        more = _problem(twin_config, None, logical_devices(MAX_LOGICAL_DEVICES, memory.pop()))
        try:
            num_needed = solve_placement(more).num_devices
        except PlacementError:
            raise too_small from error
    say(f"FP16 twin: does not fit on the {topology.num_devices} devices given; placed on {num_needed} of their size")
    problem = _problem(twin_config, None, logical_devices(num_needed, topology.devices[0].usable_bytes))
    return Plan(problem, solve_placement(problem))


def _problem(config: ModelConfig, layout: Layout | None, topology: Topology) -> PlacementProblem:
    sizes = model_sizes(config, layout)
    return PlacementProblem(config.num_layers, config.num_experts, sizes.expert_bytes, sizes.home_bytes, topology)


def _describe(plan: Plan) -> dict[str, Any]:
    return {
        "num_devices": plan.placement.num_devices,
        "lower_bound": plan.placement.lower_bound,
        "expert_bytes": plan.problem.expert_bytes,
        "total_bytes": plan.problem.total_bytes,
    }


def _read_plan(run_folder: RunFolder, name: str) -> Plan:
    values = run_folder.read_json("placement", "place").get(name)
    source = f"{run_folder.json_file('placement')}: {name}"
    values = values if isinstance(values, dict) else {}
    problem = PlacementProblem.from_dict(values.get("problem"), source)
    return Plan(problem, Placement.from_dict(values.get("placement"), problem, source))
