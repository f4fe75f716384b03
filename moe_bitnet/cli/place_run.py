"""The placement of a run: both models of a run folder on devices, written down for the steps that follow."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.solver import solve_placement
from cluster.topology import Topology, logical_devices
from moe_bitnet.checkpoint.manifest import verify_manifest
from moe_bitnet.checkpoint.native import read_info
from moe_bitnet.checkpoint.sizes import model_sizes
from moe_bitnet.cli.console import say
from moe_bitnet.cli.planning.device_plan import count_needed
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.config import ModelConfig
from moe_bitnet.errors import DataError, PlacementError
from moe_bitnet.files import write_json_atomically
from moe_bitnet.packing import LAYOUTS, Layout, check_layout
from moe_bitnet.units import format_bytes


@dataclass(frozen=True)
class Plan:
    """A model on devices.

    Attributes:
        problem: sizes and devices.
        placement: device of every expert.
    """

    problem: PlacementProblem
    placement: Placement


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


def _solve_twin(config: ModelConfig, topology: Topology) -> Plan:
    """Place the FP16 twin; if the devices are equal and too few, on as many of them as it would need."""
    twin_config = config.replace(precision="float")
    problem = _problem(twin_config, None, topology)
    try:
        return Plan(problem, solve_placement(problem))
    except PlacementError as error:
        num_needed = count_needed(lambda devices: _problem(twin_config, None, devices), topology)
        if num_needed is None:
            raise PlacementError(f"FP16 twin: {error}") from error
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
