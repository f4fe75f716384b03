"""``moe-bitnet generate``: text from models with their experts on Ray hosts, every byte between devices counted.

With ``--model`` it is one checkpoint in this process, its speed told (:mod:`moe_bitnet.cli.local_generation`).
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.placement.cost import expected_bytes_per_token
from cluster.routing.recorder import TraceRecorder
from cluster.routing.trace_file import TraceWriter
from cluster.transport.meter import TrafficMeter
from cluster.transport.row_format import CombineMode, RowFormat
from moe_bitnet.checkpoint.native import load_model
from moe_bitnet.cli import arguments
from moe_bitnet.cli.console import say
from moe_bitnet.cli.local_generation import Request, generate_alone, generate_with_cache
from moe_bitnet.cli.place import started_hosts
from moe_bitnet.cli.place_run import Plan, placed_layout, spread_plan, ternary_plan, twin_plan
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.cli.threads import single_thread
from moe_bitnet.errors import ConfigError
from moe_bitnet.experts import ExpertExecutor
from moe_bitnet.files import write_json_atomically
from moe_bitnet.model import MoETransformer
from moe_bitnet.table import TABLE_FORMATS
from moe_bitnet.tokenizer import Tokenizer

HELP = "generate text with the experts on Ray hosts; count the bytes between devices for both models"
COMBINES: dict[str, tuple[CombineMode, RowFormat]] = {
    "exact": ("rows", "float32"),
    "float32": ("partial_sums", "float32"),
    "bfloat16": ("partial_sums", "bfloat16"),
    "float16": ("partial_sums", "float16"),
    "int8": ("partial_sums", "int8"),
}
DEFAULT_PROMPT = "def read_file(path):\n    "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="tokens to add at most (default: 48)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token each time (default)")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of the sampling (default: 0)")
    parser.add_argument(
        "--kv-bits", type=int, choices=(16, 8, 4), default=16, help="of the key/value cache (default: 16)"
    )
    parser.add_argument("--model", type=Path, help="generate with this checkpoint alone, in this process, without Ray")
    parser.add_argument(
        "--head",
        choices=TABLE_FORMATS,
        help="format of embedding and head; for --model with a packed checkpoint and 16-bit cache (default: float32)",
    )
    parser.add_argument(
        "--combine",
        choices=sorted(COMBINES),
        default="float32",
        help="what expert hosts send back: 'exact' rows, or weighted sums in a format (default: float32)",
    )
    parser.add_argument(
        "--record-trace",
        type=Path,
        metavar="PARQUET",
        help="write the ternary model's routing to this file, for 'moe-bitnet place --trace'",
    )
    parser.add_argument("--address", help="host:port of a running Ray cluster (default: start Ray here)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Generate; returns the text and the traffic."""
    run_folder = RunFolder(args.run)
    tokenizer = run_folder.load_tokenizer()
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {args.max_new_tokens}; give at least 1.")
    prompt_ids = tokenizer.encode(args.prompt)
    if not prompt_ids:
        raise ConfigError("--prompt is empty. Give at least one character to continue.")
    request = Request(prompt_ids, args.max_new_tokens, args.temperature, args.seed, args.kv_bits)
    if args.model:
        if args.record_trace:
            raise ConfigError("--record-trace is for experts on hosts. Leave --model away, or the trace.")
        return _run_alone(args, tokenizer, request)
    if args.head:
        raise ConfigError(f"--head {args.head} is for one checkpoint in this process. Give --model, or leave it away.")
    from cluster.runtime import connect  # imports Ray

    combine, combine_format = COMBINES[args.combine]
    config = ClusterConfig(address=args.address, combine=combine, combine_format=combine_format)
    placed_layout(run_folder)  # an error now is quicker than after Ray has started
    with connect(config):
        return generate_run(run_folder, tokenizer, args.prompt, request, config, args.record_trace)


def _run_alone(args: argparse.Namespace, tokenizer: Tokenizer, request: Request) -> dict[str, Any]:
    result = generate_alone(args.model, request, args.head)
    text = result.text
    return {
        "prompt": args.prompt,
        "text": tokenizer.decode(text.token_ids),
        "num_prompt_tokens": len(request.prompt_ids),
        "num_new_tokens": len(text.token_ids),
        "prompt_tokens_per_s": len(request.prompt_ids) / text.prompt_s,
        "decode_tokens_per_s": text.decode_tokens_per_s,
        "weight_bytes": result.weight_bytes,
        "backend": result.backend,
    }


@single_thread()
def generate_run(
    run_folder: RunFolder,
    tokenizer: Tokenizer,
    prompt: str,
    request: Request,
    config: ClusterConfig,
    trace_path: Path | None = None,
) -> dict[str, Any]:
    """Generate on the hosts of each placement and compare with one process; needs a connected Ray."""
    plan, layout = ternary_plan(run_folder), placed_layout(run_folder)
    packed = run_folder.require_checkpoint(run_folder.packed(layout), "pack")
    text_ids, run = _run_on_hosts("ternary", packed, plan, request, config, trace_path)
    runs = [run]
    twin = twin_plan(run_folder)
    if twin.problem.topology.num_devices > plan.problem.topology.num_devices:
        say("the FP16 twin does not fit on the devices given; generating with the ternary model alone")
    elif run_folder.twin.is_dir():
        twin_config = dataclasses.replace(config, dispatch="float16", combine_format="float16")
        runs.insert(0, _run_on_hosts("float16 twin", run_folder.twin, twin, request, twin_config)[1])
        if twin.placement.num_devices > plan.placement.num_devices:
            # on as many devices as the twin and with its way back, so that int8 dispatch is all that differs
            spread = spread_plan(plan, twin.placement.num_devices)
            spread_config = dataclasses.replace(config, combine_format="float16")
            runs.append(_run_on_hosts("ternary, spread", packed, spread, request, spread_config)[1])
    result = {
        "prompt": prompt,
        "text": tokenizer.decode(text_ids),
        "num_new_tokens": len(text_ids),
        "tokens_equal_single_process": run["tokens_equal_single_process"],
        "runs": runs,
    }
    write_json_atomically(run_folder.json_file("generate"), result)
    return result


def _run_on_hosts(
    name: str, checkpoint: Path, plan: Plan, request: Request, config: ClusterConfig, trace_path: Path | None = None
) -> tuple[list[int], dict[str, Any]]:
    """Generate once in this process and once on hosts; returns the hosts' tokens and what crossed."""
    model = load_model(checkpoint)
    local_ids = generate_with_cache(model, request).token_ids
    say(f"{name}: experts on {plan.placement.num_devices} device(s), rows as {config.dispatch}")
    with started_hosts(model, plan, config) as hosts, _recorded(model, hosts.executors, trace_path):
        remote = generate_with_cache(model, request)
        traffic = _describe_traffic(hosts.meter, model, plan, config)
    is_equal = remote.token_ids == local_ids
    say(
        f"{name}: {traffic['bytes_per_token']:.0f} bytes/token between devices, of which "
        f"{traffic['modelled_bytes_per_token']:.0f} are rows and metadata "
        f"(uniform routing would give {traffic['formula_bytes_per_token']:.0f}); tokens equal one process: {is_equal}"
        + ("" if is_equal or config.returned.is_exact else " (what comes back is rounded; --combine exact is not)")
    )
    return remote.token_ids, {
        "name": name,
        "num_devices": plan.placement.num_devices,
        "dispatch": config.dispatch,
        "combine": f"{config.combine_format} {'rows' if config.combine == 'rows' else 'sums'}",
        **traffic,
        "seconds": remote.seconds,
        "tokens_equal_single_process": is_equal,
    }


@contextmanager
def _recorded(model: MoETransformer, executors: Sequence[ExpertExecutor], path: Path | None) -> Iterator[None]:
    """Record the routing within the block, if a file is named."""
    if path is None:
        yield
        return
    config = model.config
    with TraceWriter(path, num_experts=config.num_experts, num_layers=config.num_layers, top_k=config.top_k) as writer:
        model.replace_experts(TraceRecorder(writer.append, config.num_layers).wrap(executors))
        yield
    say(f"routing of {writer.num_tokens} tokens written to {path}")


def _describe_traffic(meter: TrafficMeter, model: MoETransformer, plan: Plan, config: ClusterConfig) -> dict[str, Any]:
    crossing = [(key, size) for key, size in meter.totals().items() if key.source != key.destination]
    formula = expected_bytes_per_token(
        plan.placement, model.config.top_k, model.config.hidden_size, config.dispatch, config.returned
    )
    return {
        "num_tokens": meter.num_tokens,
        "dispatch_bytes": sum(size for key, size in crossing if key.direction == "dispatch" and key.kind == "payload"),
        "combine_bytes": sum(size for key, size in crossing if key.direction == "combine" and key.kind == "payload"),
        "metadata_bytes": sum(size for key, size in crossing if key.kind == "metadata"),
        "header_bytes": sum(size for key, size in crossing if key.kind in ("header", "framing")),
        "wire_bytes": meter.wire_bytes(),
        "bytes_per_token": meter.bytes_per_token(),
        "modelled_bytes_per_token": meter.bytes_per_token(("payload", "metadata")),
        "formula_bytes_per_token": formula.total_bytes,
    }
