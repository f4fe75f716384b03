"""The headline numbers of a run, one flat object each: metric, value, unit, baseline, baseline_value, detail.

A ``*_vs_*`` value is the measured number divided by ``baseline_value``; it is ``None``
where the baseline is zero or a number is not finite.
"""

import math
from collections.abc import Sequence
from typing import Any

from moe_bitnet.cli.reporting.sections import CacheFormat, Results, TrafficRun, TrainingSection
from moe_bitnet.cli.reporting.units import divide

TWIN_RUN = "float16 twin"


def headline_metrics(results: Results) -> list[dict[str, Any]]:
    """Return the headline numbers of all steps that were run."""
    return [
        *_training_metrics(results),
        *_pack_metrics(results),
        *_place_metrics(results),
        *_traffic_metrics(results),
        *_context_metrics(results),
    ]


def load_cv(expert_load: Sequence[Sequence[float]]) -> float | None:
    """Return the mean over layers of std / mean of the experts' loads; 0 is an even load."""
    layers = [_coefficient_of_variation(layer) for layer in expert_load if layer]
    return sum(layers) / len(layers) if layers else None


def twin_run(results: Results) -> TrafficRun | None:
    """Return the generation run of the float twin, if there is one."""
    runs = results.generate.runs if results.generate else ()
    return next((run for run in runs if run.name == TWIN_RUN), None)


def ternary_runs(results: Results) -> list[TrafficRun]:
    """Return the generation runs of the ternary model, in the order in which they were run."""
    return [run for run in results.generate.runs if run.name != TWIN_RUN] if results.generate else []


def fp16_cache(results: Results) -> CacheFormat | None:
    """Return what the FP16 cache holds, the baseline of every other format."""
    formats = results.context.formats if results.context else ()
    return next((entry for entry in formats if entry.format == "fp16"), None)


def final_validation(section: TrainingSection | None) -> tuple[float, float] | None:
    """Return validation loss and perplexity: of the summary, else of the last evaluation so far."""
    if section is None:
        return None
    if section.summary is not None:
        return section.summary.validation_loss, section.summary.validation_ppl
    if section.evaluations:
        return section.evaluations[-1].validation_loss, section.evaluations[-1].validation_ppl
    return None


def _training_metrics(results: Results) -> list[dict[str, Any]]:
    ternary, twin = final_validation(results.ternary), final_validation(results.twin)
    if results.ternary is None or ternary is None:
        return []
    twin_loss, twin_ppl = twin if twin else (None, None)
    metrics = [
        _ratio("validation_loss_vs_twin", ternary[0], "float twin", twin_loss, "nats/token"),
        _ratio("validation_ppl_vs_twin", ternary[1], "float twin", twin_ppl, "perplexity"),
    ]
    summary, twin_summary = results.ternary.summary, results.twin.summary if results.twin else None
    if summary is not None:
        twin_speed = twin_summary.tokens_per_s if twin_summary else None
        twin_cv = load_cv(twin_summary.expert_load) if twin_summary else None
        metrics.append(_ratio("tokens_per_s_vs_twin", summary.tokens_per_s, "float twin", twin_speed, "1/s"))
        metrics.append(_metric("expert_load_cv", load_cv(summary.expert_load), "ratio", "float twin", twin_cv))
    return metrics


def _pack_metrics(results: Results) -> list[dict[str, Any]]:
    if (pack := results.pack) is None:
        return []
    metrics = []
    for entry in pack.layouts:
        detail = {"layout": entry.layout}
        metrics += [
            _ratio("file_bytes_vs_fp16", entry.file_bytes, "fp16", pack.fp16_file_bytes, "bytes", detail),
            _ratio("expert_bytes_vs_fp16", entry.expert_bytes, "fp16", pack.fp16_expert_bytes, "bytes", detail),
            _metric("bits_per_expert_weight", entry.bits_per_expert_weight, "bits", "fp16", 16.0, detail),
        ]
    difference = divide(pack.max_abs_logit_difference, pack.max_abs_logit)
    metrics.append(_metric("packed_logit_difference", difference, "ratio", "largest logit", pack.max_abs_logit))
    return metrics


def _place_metrics(results: Results) -> list[dict[str, Any]]:
    if (place := results.place) is None:
        return []
    detail = {
        "layout": place.layout,
        "lower_bound": place.ternary.lower_bound,
        "baseline_lower_bound": place.float16.lower_bound,
        "devices_available": len(place.devices),
    }
    return [_metric("devices", place.ternary.num_devices, "count", "float16", place.float16.num_devices, detail)]


def _traffic_metrics(results: Results) -> list[dict[str, Any]]:
    twin = twin_run(results)
    return [
        _metric(
            "inter_device_bytes_per_token",
            run.bytes_per_token,
            "bytes",
            TWIN_RUN,
            twin.bytes_per_token if twin else None,
            {
                "run": run.name,
                "num_devices": run.num_devices,
                "dispatch": run.dispatch,
                "combine": run.combine,
                "formula": run.formula_bytes_per_token,
                "vs_twin": divide(run.bytes_per_token, twin.bytes_per_token if twin else None),
                "tokens_equal_single_process": run.tokens_equal_single_process,
            },
        )
        for run in ternary_runs(results)
    ]


def _context_metrics(results: Results) -> list[dict[str, Any]]:
    context, fp16 = results.context, fp16_cache(results)
    if context is None or fp16 is None:
        return []
    metrics = []
    for entry in context.formats:
        if entry is fp16:
            continue
        detail = {
            "format": entry.format,
            "model": context.model,
            "budget_bytes": context.budget_bytes,
            "trained_seq_len": context.trained_seq_len,
        }
        ppl_detail = {**detail, "common_num_tokens": context.common_num_tokens}
        metrics += [
            _ratio("max_context_multiple", entry.num_tokens, "fp16 cache", fp16.num_tokens, "tokens", detail),
            _ratio("context_ppl_vs_fp16", entry.ppl_common, "fp16 cache", fp16.ppl_common, "perplexity", ppl_detail),
        ]
    return metrics


def _ratio(
    name: str,
    measured: float,
    baseline: str,
    baseline_value: float | None,
    measured_unit: str,
    detail: dict[str, Any] | None = None,
) -> dict[str, Any]:
    both = {**(detail or {}), "measured": measured, "measured_unit": measured_unit}
    return _metric(name, divide(measured, baseline_value), "ratio", baseline, baseline_value, both)


def _metric(
    name: str,
    value: float | None,
    unit: str,
    baseline: str,
    baseline_value: float | None,
    detail: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "metric": f"demo.{name}",
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "baseline_value": baseline_value,
        "detail": detail or {},
    }


def _coefficient_of_variation(loads: Sequence[float]) -> float:
    mean = sum(loads) / len(loads)
    if mean == 0:
        return 0.0
    return math.sqrt(sum((load - mean) ** 2 for load in loads) / len(loads)) / mean
