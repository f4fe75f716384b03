"""``moe-bitnet generate``: text from models with their experts on Ray hosts, every byte between devices counted."""

import argparse
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.placement.cost import expected_bytes_per_token
from cluster.transport.meter import TrafficMeter
from kvcache import KVCacheConfig, QuantizedKVCache
from kvcache.memory import bytes_for_tokens
from moe_bitnet.checkpoint.native import load_model
from moe_bitnet.cli import arguments
from moe_bitnet.cli.console import progress_bar, say
from moe_bitnet.cli.place import Plan, placed_layout, spread_plan, started_hosts, ternary_plan, twin_plan
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.cli.threads import single_thread
from moe_bitnet.errors import ConfigError
from moe_bitnet.files import write_json_atomically
from moe_bitnet.generation import generate
from moe_bitnet.model import MoETransformer
from moe_bitnet.tokenizer import Tokenizer

HELP = "generate text with the experts on Ray hosts; count the bytes between devices for both models"
DEFAULT_PROMPT = "def read_file(path):\n    "


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompt_ids: the prompt's tokens.
        max_new_tokens: tokens to add at most.
        temperature: 0 is greedy.
        seed: of the sampling.
        kv_bits: bits of the key/value cache, 16, 8 or 4.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    temperature: float
    seed: int
    kv_bits: int


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
        new_ids, _ = _generate(load_model(args.model), request)
        return {"prompt": args.prompt, "text": tokenizer.decode(new_ids), "num_new_tokens": len(new_ids)}
    from cluster.runtime import connect  # imports Ray

    config = ClusterConfig(address=args.address)
    placed_layout(run_folder)  # an error now is quicker than after Ray has started
    with connect(config):
        return generate_run(run_folder, tokenizer, args.prompt, request, config)


@single_thread()
def generate_run(
    run_folder: RunFolder, tokenizer: Tokenizer, prompt: str, request: Request, config: ClusterConfig
) -> dict[str, Any]:
    """Generate on the hosts of each placement and compare with one process; needs a connected Ray."""
    plan, layout = ternary_plan(run_folder), placed_layout(run_folder)
    packed = run_folder.require_checkpoint(run_folder.packed(layout), "pack")
    text_ids, run = _run_on_hosts("ternary", packed, plan, request, config)
    runs = [run]
    twin = twin_plan(run_folder)
    if twin.problem.topology.num_devices > plan.problem.topology.num_devices:
        say("the FP16 twin does not fit on the devices given; generating with the ternary model alone")
    elif run_folder.twin.is_dir():
        twin_config = dataclasses.replace(config, dispatch="float16", combine="float16")
        runs.insert(0, _run_on_hosts("float16 twin", run_folder.twin, twin, request, twin_config)[1])
        if twin.placement.num_devices > plan.placement.num_devices:
            # on as many devices as the twin and with its way back, so that int8 dispatch is all that differs
            spread = spread_plan(plan, twin.placement.num_devices)
            spread_config = dataclasses.replace(config, combine="float16")
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
    name: str, checkpoint: Path, plan: Plan, request: Request, config: ClusterConfig
) -> tuple[list[int], dict[str, Any]]:
    """Generate once in this process and once on hosts; returns the hosts' tokens and what crossed."""
    model = load_model(checkpoint)
    local_ids, _ = _generate(model, request)
    say(f"{name}: experts on {plan.placement.num_devices} device(s), rows as {config.dispatch}")
    with started_hosts(model, plan, config) as hosts:
        remote_ids, seconds = _generate(model, request)
        traffic = _describe_traffic(hosts.meter, model, plan, config)
    is_equal = remote_ids == local_ids
    say(f"{name}: {traffic['bytes_per_token']:.0f} bytes/token between devices; tokens equal one process: {is_equal}")
    return remote_ids, {
        "name": name,
        "num_devices": plan.placement.num_devices,
        "dispatch": config.dispatch,
        "combine": config.combine,
        **traffic,
        "seconds": seconds,
        "tokens_equal_single_process": is_equal,
    }


def _generate(model: MoETransformer, request: Request) -> tuple[list[int], float]:
    config = model.config
    cache_config = KVCacheConfig(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        key_bits=request.kv_bits,
        value_bits=request.kv_bits,
    )
    budget_bytes = bytes_for_tokens(cache_config, len(request.prompt_ids) + request.max_new_tokens)
    cache = QuantizedKVCache(cache_config, budget_bytes)
    start = time.perf_counter()
    with progress_bar("generate", request.max_new_tokens) as bar:
        done = 0

        def on_token(token_id: int) -> None:
            nonlocal done
            done += 1
            bar.update(done)

        new_ids = generate(
            model,
            request.prompt_ids,
            request.max_new_tokens,
            cache,
            temperature=request.temperature,
            seed=request.seed,
            on_token=on_token,
        )
    return new_ids, time.perf_counter() - start


def _describe_traffic(meter: TrafficMeter, model: MoETransformer, plan: Plan, config: ClusterConfig) -> dict[str, Any]:
    crossing = [(key, size) for key, size in meter.totals().items() if key.source != key.destination]
    formula = expected_bytes_per_token(
        plan.placement, model.config.top_k, model.config.hidden_size, config.dispatch, config.combine
    )
    return {
        "num_tokens": meter.num_tokens,
        "dispatch_bytes": sum(size for key, size in crossing if key.direction == "dispatch" and key.kind == "payload"),
        "combine_bytes": sum(size for key, size in crossing if key.direction == "combine" and key.kind == "payload"),
        "metadata_bytes": sum(size for key, size in crossing if key.kind == "metadata"),
        "header_bytes": sum(size for key, size in crossing if key.kind == "header"),
        "bytes_per_token": meter.bytes_per_token(),
        "formula_bytes_per_token": formula.total_bytes,
    }
