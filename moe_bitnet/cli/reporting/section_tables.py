"""The tables beside the figures: the numbers behind each drawing, one function a section.

Each returns empty markup where its step was not run.
"""

from typing import Any

from moe_bitnet.cli.reporting.markup import Markup, element, join, table
from moe_bitnet.cli.reporting.metrics import fp16_cache
from moe_bitnet.cli.reporting.sections import Results, TrainingSection
from moe_bitnet.cli.reporting.units import (
    DASH,
    divide,
    format_bytes,
    format_count,
    format_number,
    format_ratio,
    format_seconds,
    format_significant,
)


def training_table(results: Results) -> Markup:
    """Compare the two trainings: quality, size, speed."""
    summaries = [_summary(results.twin), _summary(results.ternary)]
    if not any(summaries):
        return Markup()

    def row(name: str, write: Any) -> list[str]:
        return [name, *(write(summary) if summary is not None else DASH for summary in summaries)]

    rows = [
        row("validation loss", lambda summary: format_number(summary.validation_loss)),
        row("perplexity", lambda summary: format_number(summary.validation_ppl, 2)),
        row("bits per byte", lambda summary: format_number(summary.validation_bits_per_byte)),
        row("parameters", lambda summary: format_count(summary.num_parameters)),
        row("in experts", lambda summary: format_count(summary.num_expert_parameters)),
        row("steps", lambda summary: format_count(summary.num_steps)),
        row("tokens per second", lambda summary: format_number(summary.tokens_per_s, 0)),
        row("training time", lambda summary: format_seconds(summary.train_s)),
        row("peak learning rate", lambda summary: format_significant(summary.peak_learning_rate)),
        row("compiled", lambda summary: "yes" if summary.is_compiled else "no"),
    ]
    return table(["", "float twin", "ternary"], rows)


def pack_table(results: Results) -> Markup:
    """Show file and experts in each layout, and what packing did to the logits."""
    if (pack := results.pack) is None:
        return Markup()
    rows = [["FP16", format_bytes(pack.fp16_file_bytes), format_bytes(pack.fp16_expert_bytes), "16.00"]]
    for entry in pack.layouts:
        bits = format_number(entry.bits_per_expert_weight, 2)
        rows.append([entry.layout, format_bytes(entry.file_bytes), format_bytes(entry.expert_bytes), bits])
    note = (
        f"The packed model's logits differ from the unpacked ones by at most "
        f"{format_significant(pack.max_abs_logit_difference)}; "
        f"the largest logit is {format_number(pack.max_abs_logit, 1)}."
    )
    return join(table(["layout", "file", "experts", "bits a weight"], rows), element("p", note, class_="aside"))


def place_table(results: Results) -> Markup:
    """Show what each format needs, and the devices there were."""
    if (place := results.place) is None:
        return Markup()
    rows = [
        ["devices needed", str(place.float16.num_devices), str(place.ternary.num_devices)],
        ["lower bound", str(place.float16.lower_bound), str(place.ternary.lower_bound)],
        ["one expert", format_bytes(place.float16.expert_bytes), format_bytes(place.ternary.expert_bytes)],
        ["whole model", format_bytes(place.float16.total_bytes), format_bytes(place.ternary.total_bytes)],
    ]
    devices = [
        [device.name, format_bytes(device.memory_bytes), format_bytes(device.reserved_bytes)]
        for device in place.devices
    ]
    return join(table(["", "FP16", place.layout], rows), table(["device", "memory", "reserved"], devices))


def traffic_table(results: Results) -> Markup:
    """Split the bytes of each generation run by what they carry."""
    if (generate := results.generate) is None:
        return Markup()
    rows = []
    for run in generate.runs:
        parts = (run.dispatch_bytes, run.combine_bytes, run.metadata_bytes, run.header_bytes)
        per_token = [format_bytes(round(part / run.num_tokens)) if run.num_tokens else DASH for part in parts]
        same = "yes" if run.tokens_equal_single_process else "no"
        rows.append([run.name, *per_token, format_seconds(run.seconds), same])
    header = ["bytes a token", "dispatch", "combine", "metadata", "headers", "time", "same tokens"]
    verdict = "the same tokens as" if generate.tokens_equal_single_process else "other tokens than"
    note = f"Generation with remote experts gave {verdict} one process with all experts in it."
    return join(table(header, rows), element("p", note, class_="aside"))


def context_table(results: Results) -> Markup:
    """Show tokens, bytes and perplexity of each cache format."""
    if (context := results.context) is None:
        return Markup()
    fp16 = fp16_cache(results)
    rows = [
        [
            entry.format,
            format_count(entry.num_tokens),
            format_ratio(divide(entry.num_tokens, fp16.num_tokens if fp16 else None)),
            format_bytes(entry.bytes_per_token),
            format_number(entry.ppl_common, 2),
            format_number(entry.ppl_all, 2),
        ]
        for entry in context.formats
    ]
    note = (
        f"Model: {context.model}. “PPL” is over the same {format_count(context.common_num_tokens)} tokens, in "
        f"windows of the trained length; “PPL, all” over all tokens held, and there it also shows that the model "
        f"was trained on {format_count(context.trained_seq_len)} tokens at a time, not on longer ones."
    )
    header = ["cache", "tokens", "ratio", "a token", "PPL", "PPL, all"]
    return join(table(header, rows), element("p", note, class_="aside"))


def load_table(results: Results) -> Markup:
    """Show the busiest and the idlest expert of each model."""
    rows = []
    for name, section in (("float twin", results.twin), ("ternary", results.ternary)):
        summary = _summary(section)
        if summary is None or not any(summary.expert_load):
            continue
        shares = [share * len(layer) for layer in summary.expert_load for share in layer]
        points = section.points if section is not None else ()
        cv = format_number(points[-1].expert_load_cv, 2) if points else DASH
        rows.append([name, format_number(max(shares), 2), format_number(min(shares), 2), cv])
    return table(["", "busiest", "idlest", "CV, last step"], rows) if rows else Markup()


def _summary(section: TrainingSection | None) -> Any:
    return section.summary if section is not None else None
