"""``moe-bitnet place`` of a model that need not be there: its shape on devices, FP16 against ternary.

Every format of the experts is planned twice: expert weights alone, and everything, with the shared weights and a
key/value cache on the home device. The plan that counts is everything in ``--layout``: it must fit, and it is written.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from cluster.placement.placement import Placement
from cluster.reserve import reserve_bytes
from cluster.topology import Topology
from moe_bitnet.cli.place_devices import find_devices
from moe_bitnet.cli.place_table import print_plans
from moe_bitnet.cli.planning.device_plan import COMBINE, DevicePlan, ModelBytes, plan_devices, predicted_bytes_per_token
from moe_bitnet.cli.planning.device_pool import DevicePool
from moe_bitnet.cli.planning.known_shapes import KNOWN_SHAPES
from moe_bitnet.cli.planning.model_bytes import WEIGHT_FORMATS, expert_bytes, kv_bytes, shared_bytes, shared_precision
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
    pool = find_devices(args, reserve_bytes(shape.hidden_size, shape.intermediate_size, MAX_BATCH_TOKENS))
    plans = [plan_devices(model, pool) for model in _models(source, args)]
    chosen = next(plan for plan in plans if (plan.model.weights, plan.model.counted) == (args.layout, "everything"))
    if args.placement is not None:
        chosen = _with_own_placement(chosen, _largest(plans) if pool.is_open else pool.topology, args)
        plans.append(chosen)
    rows = [(plan, _predict(plan, source)) for plan in plans]
    if not args.json:
        print_plans(_title(source, pool), _caption(source, args), rows)
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
        "plans": [_describe(plan, bytes_per_token) for plan, bytes_per_token in rows],
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


def _predict(plan: DevicePlan, source: ModelSource) -> float | None:
    if plan.placement is None:
        return None
    return predicted_bytes_per_token(plan.placement, source.shape, plan.model.weights)


def _title(source: ModelSource, pool: DevicePool) -> str:
    shape = source.shape
    layers = f"{shape.num_expert_layers} layers of {shape.num_experts} experts, top-{shape.top_k}"
    return f"{source.name}: {layers}, {shape.num_weights / 1e9:.4g}B weights, on {pool.name}"


def _caption(source: ModelSource, args: argparse.Namespace) -> str:
    cache = f"a cache of {args.context:,} tokens in {args.kv_format}" if args.context else "no cache (give --context)"
    return (
        f"Everything is experts, shared weights ({shared_precision(source, args.shared_bits)}; of fp16 always 16 bits) "
        f"and {cache}, the last two at home. Traffic is the bytes of a token between devices, both ways, if all "
        f"experts are equally likely: float16 rows out for fp16, int8 for ternary; {COMBINE.row_format} sums back."
    )


def _describe(plan: DevicePlan, bytes_per_token: float | None) -> dict[str, Any]:
    model = plan.model
    return {
        **dataclasses.asdict(model),
        "all_expert_bytes": model.all_expert_bytes,
        "num_devices": plan.num_devices,
        "lower_bound": plan.lower_bound,
        "fits": plan.placement is not None,
        "shortfall": plan.shortfall,
        "bytes_per_token": bytes_per_token,
    }
