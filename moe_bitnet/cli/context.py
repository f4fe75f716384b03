"""``moe-bitnet context``: how many tokens of keys and values fit into a memory, in each cache format.

With ``--model`` it is a plan: weights, intermediate results and cache of one process, by arithmetic that the allocator
follows to the byte. Without it, caches of one size are really filled with text of a run (:mod:`context_run`).
"""

import argparse
import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_bitnet.cli.context_run import fill_caches
from moe_bitnet.cli.planning.known_shapes import KNOWN_SHAPES
from moe_bitnet.cli.planning.memory_plan import MemoryPlan, plan_memory
from moe_bitnet.cli.planning.model_shape import WEIGHT_BITS, ModelShape
from moe_bitnet.cli.planning.model_source import find_model
from moe_bitnet.cli.run_folder import RunFolder
from moe_bitnet.errors import ConfigError
from moe_bitnet.packing import LAYOUTS
from moe_bitnet.units import format_bytes, parse_memory

HELP = "plan how many tokens fit beside a model (--model), or fill caches of one size with a run's text"
DEFAULT_BUDGET = "4MB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    plan = parser.add_argument_group("plan")
    plan.add_argument(
        "--model",
        help=f"Hugging Face folder or config.json, checkpoint or run folder, or one of {', '.join(KNOWN_SHAPES)}",
    )
    plan.add_argument(
        "--weights-bits",
        choices=WEIGHT_BITS,
        help="bits of the layers' weights, without their scales (default: the files' bytes, or 16)",
    )
    plan.add_argument("--sequences", type=int, default=1, help="held at the same time (default: 1)")
    plan.add_argument("--chunk", type=int, default=512, help="tokens of prefill in one pass (default: 512)")
    plan.add_argument("--calibrated", action="store_true", help="count the maps of calibrated caches")
    parser.add_argument(
        "--memory", help=f"for everything, such as 24GB; without --model for each cache (default: {DEFAULT_BUDGET})"
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="2bit", help="without --model: which packed model to run")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan or fill; returns tokens by format, and prints them unless ``--json`` was given."""
    if args.model is None:
        result = fill_caches(RunFolder(args.run), parse_memory(args.memory or DEFAULT_BUDGET), args.layout)
        if not args.json:
            _print(_run_table(result))
        return result
    if args.memory is None:
        raise ConfigError("--memory is missing; give what weights and cache may take together, such as 24GB.")
    source = find_model(args.model)
    weight_bytes, weight_source = source.weights(args.weights_bits)
    memory_bytes = parse_memory(args.memory)
    plan = plan_memory(source.shape, memory_bytes, weight_bytes, args.sequences, args.chunk, args.calibrated)
    if not args.json:
        _print(_parts_table(source.name, source.shape, plan, weight_source), _formats_table(source.shape, plan))
    return {
        "model": source.name,
        "shape": dataclasses.asdict(source.shape),
        "num_weights": source.shape.num_weights,
        "weights": weight_source,
        **dataclasses.asdict(plan),
    }


def _parts_table(name: str, shape: ModelShape, plan: MemoryPlan, weight_source: str) -> Table:
    heads = f"{shape.num_layers} layers, {shape.num_kv_heads} KV heads of {shape.head_dim}"
    table = _table(f"{name}: {heads}, {shape.num_weights / 1e9:.3g}B weights", "memory", "bytes")
    sequences = "1 sequence" if plan.num_sequences == 1 else f"{plan.num_sequences} sequences"
    for part, num_bytes in (
        (f"weights, {weight_source}", plan.weight_bytes),
        (f"one pass of {plan.num_chunk_tokens} tokens", plan.workspace_bytes),
        (f"logits of {sequences}", plan.logit_bytes),
        ("maps of a calibrated cache", plan.frame_bytes),
        (f"cache: float16 sinks and windows of {sequences}", plan.exact_bytes),
        ("cache: pages", plan.cache_budget_bytes - plan.exact_bytes),
    ):
        if num_bytes:
            table.add_row(part, format_bytes(num_bytes))
    table.add_row("all", format_bytes(plan.memory_bytes))
    return table


def _formats_table(shape: ModelShape, plan: MemoryPlan) -> Table:
    tokens = "tokens" if plan.num_sequences == 1 else f"tokens, each of {plan.num_sequences}"
    table = _table("", "cache", tokens, "× FP16", "bytes a token", "bits", "allocated")
    for entry in plan.formats:
        table.add_row(
            entry.format,
            f"{entry.num_tokens:,}",
            f"{entry.multiple:.2f}",
            f"{entry.bytes_per_token:,.0f}",
            f"{entry.effective_bits:.3f}",
            format_bytes(entry.cache_bytes),
        )
    if 0 < shape.max_seq_len < max(entry.num_tokens for entry in plan.formats):
        table.caption = f"The model was made for {shape.max_seq_len:,} positions."
        table.caption_justify = "left"
    return table


def _run_table(result: dict[str, Any]) -> Table:
    title = f"{result['model']}, {format_bytes(result['budget_bytes'])} a cache"
    table = _table(title, "cache", "tokens", "bytes a token", "bits", "PPL", "PPL, all")
    for entry in result["formats"]:
        table.add_row(
            entry["format"],
            f"{entry['num_tokens']:,}",
            f"{entry['bytes_per_token']:,.0f}",
            f"{entry['effective_bits']:.3f}",
            f"{entry['ppl_common']:.2f}",
            f"{entry['ppl_all']:.2f}",
        )
    return table


def _table(title: str, first: str, *others: str) -> Table:
    """Return an empty table: text in the first column, numbers in the others."""
    table = Table(title=title or None, title_justify="left", header_style="bold", pad_edge=False, box=None)
    table.add_column(first, overflow="fold")
    for header in others:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _print(*tables: Table) -> None:
    """Write tables to stdout."""
    console = Console(highlight=False)
    for table in tables:
        console.print(table)
