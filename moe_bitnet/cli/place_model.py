"""``moe-bitnet place`` of a model that need not be there: its shape on devices, FP16 against ternary.

Every format of the experts is planned twice: expert weights alone, and everything, with the shared weights and a
key/value cache on the home device. The plan that counts is everything in ``--layout``: it must fit, and it is written.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from cluster.placement.placement import Placement
from cluster.placement.problem import PlacementProblem
from cluster.placement.report import PlacementReport
from cluster.placement.solver import solve_placement
from cluster.reserve import reserve_bytes
from cluster.routing.trace import RoutingTrace
from cluster.routing.trace_file import read_trace
from cluster.topology import Topology
from moe_bitnet.cli.console import progress_bar
from moe_bitnet.cli.place_devices import find_devices
from moe_bitnet.cli.place_table import describe_model, print_plans
from moe_bitnet.cli.planning.device_plan import COMBINE, DevicePlan, ModelBytes, plan_devices, report_plan
from moe_bitnet.cli.planning.device_pool import DevicePool
from moe_bitnet.cli.planning.known_shapes import KNOWN_SHAPES
from moe_bitnet.cli.planning.model_bytes import WEIGHT_FORMATS, expert_bytes, kv_bytes, shared_bytes, shared_precision
from moe_bitnet.cli.planning.model_shape import ModelShape
from moe_bitnet.cli.planning.model_source import ModelSource, find_model
from moe_bitnet.errors import ConfigError, PlacementError

MAX_BATCH_TOKENS = 4096
"""Rows of the largest batch that a host's workspace is reserved for on discovered devices."""


def place_model(args: argparse.Namespace) -> dict[str, Any]:
    """Plan and print; returns what ``--json`` shows.

    Raises:
        ConfigError: the model or the devices do not exist, or options contradict each other.
        PlacementError: everything in ``--layout`` does not fit on the devices.
    """
    source = _find_model(args)
    shape = source.shape
    kv_bytes(shape, args.context, args.kv_format)  # an error now is quicker than after probing a cluster
    trace = _read_trace(args, shape)
    pool = find_devices(args, reserve_bytes(shape.hidden_size, shape.intermediate_size, MAX_BATCH_TOKENS))
    plans = _plan(_models(source, args), pool, args, trace)
    chosen = next(plan for plan in plans if (plan.model.weights, plan.model.counted) == (args.layout, "everything"))
    if args.placement is not None:
        chosen = _with_own_placement(chosen, _largest(plans) if pool.is_open else pool.topology, args)
        plans.append(chosen)
    rows = [(plan, report_plan(plan, shape, _trace_of(plan, trace), args.max_imbalance)) for plan in plans]
    if not args.json:
        print_plans(describe_model(source, pool.name), _caption(source, args, trace), rows)
        _print_summary(next(report for plan, report in rows if plan is chosen), chosen)
    if chosen.placement is None:
        raise PlacementError(f"{args.layout}, everything counted, does not fit: {chosen.shortfall}")
    if args.output is not None:
        chosen.placement.to_json(args.output)
    used = _largest(plans)
    if args.save_topology is not None:
        used.to_json(args.save_topology)
    return {
        "model": source.name,
        "shape": dataclasses.asdict(shape),
        "devices": pool.name,
        "layout": args.layout,
        "context_len": args.context,
        "kv_format": args.kv_format if args.context else None,
        "shared_weights": shared_precision(source, args.shared_bits),
        "plans": [_describe(plan, report) for plan, report in rows],
        "placement": chosen.placement.to_dict(),
        "topology": used.to_dict(),
    }


def _find_model(args: argparse.Namespace) -> ModelSource:
    if args.shape is not None:
        if args.shape.lower() not in KNOWN_SHAPES:
            raise ConfigError(f"--shape {args.shape} is not known. Known are {', '.join(KNOWN_SHAPES)}.")
        return find_model(args.shape)
    return find_model(str(args.model or args.config), has_cache=args.context > 0)


def _models(source: ModelSource, args: argparse.Namespace) -> Sequence[ModelBytes]:
    shape = source.shape
    models = []
    for weights in WEIGHT_FORMATS:
        size = expert_bytes(source, weights)
        models.append(ModelBytes(weights, "experts only", shape.num_expert_layers, shape.num_experts, size))
    for experts in models[: len(WEIGHT_FORMATS)]:
        shared = shared_bytes(source, experts.weights, args.shared_bits)
        cache = kv_bytes(shape, args.context, args.kv_format)
        models.append(dataclasses.replace(experts, counted="everything", shared_bytes=shared, kv_bytes=cache))
    return models


def _largest(plans: Sequence[DevicePlan]) -> Topology:
    """Return the devices of the plan that takes most of them."""
    fitting = [plan.problem.topology for plan in plans if plan.placement is not None]
    return max(fitting or [plans[0].problem.topology], key=lambda topology: topology.num_devices)


def _with_own_placement(plan: DevicePlan, topology: Topology, args: argparse.Namespace) -> DevicePlan:
    problem = plan.model.problem(topology)
    placement = Placement.from_json(args.placement, problem)
    if args.devices is not None and placement.num_devices > args.devices:
        raise PlacementError(
            f"{args.placement}: it uses {placement.num_devices} devices, --devices allows {args.devices}. Allow more."
        )
    model = dataclasses.replace(plan.model, counted="own placement")
    return dataclasses.replace(
        plan, model=model, num_devices=placement.num_devices, problem=problem, placement=placement, shortfall=""
    )


def _read_trace(args: argparse.Namespace, shape: ModelShape) -> RoutingTrace | None:
    if args.trace is None:
        if args.replicas:
            raise ConfigError("--replicas copies the experts that a routing finds hot. Give --trace FILE too.")
        return None
    trace = read_trace(args.trace)
    found, wanted = (
        (trace.num_layers, trace.num_experts, trace.top_k),
        (shape.num_expert_layers, shape.num_experts, shape.top_k),
    )
    if found != wanted:
        raise ConfigError(
            f"{args.trace}: it has {found[0]} layers of {found[1]} experts, top-{found[2]}; the model {wanted[0]} of "
            f"{wanted[1]}, top-{wanted[2]}. Give a trace of this model."
        )
    return trace


def _plan(
    models: Sequence[ModelBytes], pool: DevicePool, args: argparse.Namespace, trace: RoutingTrace | None
) -> list[DevicePlan]:
    """Plan all models; by a trace, which takes its time, those with everything counted."""
    if trace is None:
        return [plan_devices(model, pool) for model in models]
    num_solved = sum(model.counted == "everything" for model in models)
    plans: list[DevicePlan] = []
    with progress_bar("place by trace", num_solved * trace.num_layers) as bar:
        num_begun = 0

        def solve(problem: PlacementProblem) -> Placement:
            nonlocal num_begun
            first, num_begun = num_begun * trace.num_layers, num_begun + 1
            return solve_placement(
                problem,
                trace=trace,
                max_imbalance=args.max_imbalance,
                with_replicas=args.replicas,
                on_progress=lambda num_done, _: bar.update(first + num_done),
            )

        for model in models:
            plans.append(plan_devices(model, pool, solve if model.counted == "everything" else solve_placement))
    return plans


def _trace_of(plan: DevicePlan, trace: RoutingTrace | None) -> RoutingTrace | None:
    return None if plan.model.counted == "experts only" else trace


def _print_summary(report: PlacementReport | None, plan: DevicePlan) -> None:
    if report is not None:
        print(f"{plan.model.weights}, {plan.model.counted}: {report.summary()}")


def _caption(source: ModelSource, args: argparse.Namespace, trace: RoutingTrace | None) -> str:
    precision = shared_precision(source, args.shared_bits)
    if precision != "16 bits":
        precision += "; of fp16 16 bits"
    cache = f"a cache of {args.context:,} tokens in {args.kv_format}" if args.context else "no cache (give --context)"
    caption = (
        f"Everything is experts, shared weights ({precision}) and {cache}, the last two at home. Traffic is the bytes "
        f"of a token between devices, both ways, if all experts are equally likely: float16 rows out for fp16, int8 "
        f"for ternary; {COMBINE.row_format} sums back."
    )
    if trace is None:
        return caption
    return (
        f"{caption} Traced is the same in the {trace.num_tokens:,} tokens of the trace; load is that of the device "
        f"with most over the mean, in the worst layer."
    )


def _describe(plan: DevicePlan, report: PlacementReport | None) -> dict[str, Any]:
    model = plan.model
    return {
        **dataclasses.asdict(model),
        "all_expert_bytes": model.all_expert_bytes,
        "num_devices": plan.num_devices,
        "lower_bound": plan.lower_bound,
        "fits": plan.placement is not None,
        "shortfall": plan.shortfall,
        "report": None if report is None else report.to_dict(),
    }
