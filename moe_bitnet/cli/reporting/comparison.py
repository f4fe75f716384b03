"""The table a person reads in half a minute: what, FP16 twin, ternary, ratio. Every cell is text."""

from dataclasses import dataclass

from moe_bitnet.cli.reporting.metrics import final_validation, fp16_cache, ternary_runs, twin_run
from moe_bitnet.cli.reporting.sections import Results
from moe_bitnet.cli.reporting.units import (
    DASH,
    divide,
    format_bytes,
    format_change,
    format_count,
    format_number,
    format_ratio,
)


@dataclass(frozen=True)
class ComparisonRow:
    """One row; ``group`` is the step that the numbers come from."""

    group: str
    what: str
    twin: str
    ternary: str
    ratio: str


def comparison_rows(results: Results) -> list[ComparisonRow]:
    """Return the rows of all steps that were run, in the order of the steps."""
    return [
        *_training_rows(results),
        *_pack_rows(results),
        *_place_rows(results),
        *_traffic_rows(results),
        *_context_rows(results),
    ]


def _training_rows(results: Results) -> list[ComparisonRow]:
    ternary, twin = final_validation(results.ternary), final_validation(results.twin)
    rows = []
    if ternary or twin:
        for index, what, digits in ((0, "validation loss (nats/token)", 3), (1, "validation perplexity", 2)):
            left, right = twin[index] if twin else None, ternary[index] if ternary else None
            change = format_change(divide(right, left))
            rows.append(
                ComparisonRow("training", what, format_number(left, digits), format_number(right, digits), change)
            )
    left_summary = results.twin.summary if results.twin else None
    right_summary = results.ternary.summary if results.ternary else None
    if left_summary or right_summary:
        left = left_summary.tokens_per_s if left_summary else None
        right = right_summary.tokens_per_s if right_summary else None
        ratio = format_ratio(divide(right, left))
        rows.append(
            ComparisonRow(
                "training", "training speed (tokens/s)", format_number(left, 0), format_number(right, 0), ratio
            )
        )
    return rows


def _pack_rows(results: Results) -> list[ComparisonRow]:
    if (pack := results.pack) is None:
        return []
    fp16_file, fp16_experts = format_bytes(pack.fp16_file_bytes), format_bytes(pack.fp16_expert_bytes)
    rows = []
    for entry in pack.layouts:
        file_ratio = divide(entry.file_bytes, pack.fp16_file_bytes)
        expert_ratio = divide(entry.expert_bytes, pack.fp16_expert_bytes)
        file, experts = format_bytes(entry.file_bytes), format_bytes(entry.expert_bytes)
        rows += [
            ComparisonRow("size", f"model file, {entry.layout}", fp16_file, file, format_ratio(file_ratio)),
            ComparisonRow("size", f"expert weights, {entry.layout}", fp16_experts, experts, format_ratio(expert_ratio)),
        ]
    return rows


def _place_rows(results: Results) -> list[ComparisonRow]:
    if (place := results.place) is None:
        return []
    left, right = place.float16, place.ternary
    devices_ratio = format_ratio(divide(right.num_devices, left.num_devices))
    bytes_ratio = format_ratio(divide(right.expert_bytes, left.expert_bytes))
    return [
        ComparisonRow("devices", "devices needed", str(left.num_devices), str(right.num_devices), devices_ratio),
        ComparisonRow(
            "devices", "one expert", format_bytes(left.expert_bytes), format_bytes(right.expert_bytes), bytes_ratio
        ),
    ]


def _traffic_rows(results: Results) -> list[ComparisonRow]:
    twin = twin_run(results)
    twin_text = _traffic_text(twin.bytes_per_token, twin.num_devices) if twin else DASH
    return [
        ComparisonRow(
            "traffic",
            f"between devices, per token ({run.name})",
            twin_text,
            _traffic_text(run.bytes_per_token, run.num_devices),
            format_ratio(divide(run.bytes_per_token, twin.bytes_per_token if twin else None)),
        )
        for run in ternary_runs(results)
    ]


def _context_rows(results: Results) -> list[ComparisonRow]:
    context, fp16 = results.context, fp16_cache(results)
    if context is None or fp16 is None:
        return []
    budget = format_bytes(context.budget_bytes)
    return [
        ComparisonRow(
            "context",
            f"tokens in {budget}, {entry.format} cache",
            f"{format_count(fp16.num_tokens)} (fp16)",
            format_count(entry.num_tokens),
            format_ratio(divide(entry.num_tokens, fp16.num_tokens)),
        )
        for entry in context.formats
        if entry is not fp16
    ]


def _traffic_text(bytes_per_token: float, num_devices: int) -> str:
    return f"{format_bytes(bytes_per_token)} on {num_devices}"
