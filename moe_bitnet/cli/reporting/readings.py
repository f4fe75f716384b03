"""What each figure says in a sentence, what its number counts, and the key figures of the headline strip.

Sentences are made from the numbers, so they stay true when the numbers turn out badly.
"""

from dataclasses import dataclass

from moe_bitnet.cli.reporting.metrics import final_validation, fp16_cache, load_cv, ternary_runs, twin_run
from moe_bitnet.cli.reporting.plots import load_section
from moe_bitnet.cli.reporting.sections import CacheFormat, PackedLayout, Results
from moe_bitnet.cli.reporting.units import (
    DASH,
    divide,
    format_bytes,
    format_change,
    format_count,
    format_number,
    format_ratio,
)

COUNTS = {
    "loss": (
        "Mean cross-entropy of the next token in nats. Validation text is held out of training. The twin has "
        "the same shape, norms, data, seed and steps, with float weights and a peak learning rate of its own. One seed."
    ),
    "sizes": (
        "Bytes of the file as it lies on disk, embeddings, norms and scales included; “expert weights” are the "
        "routed experts' matrices with their scales. 1 MB = 1,000,000 bytes."
    ),
    "devices": (
        "Devices that hold every expert once, given the memory left after what is reserved on each. The lower bound "
        "is how few any placement could use."
    ),
    "traffic": (
        "Bytes that leave one device for another, divided by the tokens passed through the model: activations out "
        "(dispatch), expert outputs back (combine), routing metadata and frame headers. Bytes within a device count 0. "
        "The diamond is what the formula predicts, without headers and for uniform routing; labels read "
        "dispatch → combine format."
    ),
    "context": (
        "Tokens whose keys and values fit into the budget, really allocated and filled. PPL in the figure is over the "
        "same windows of the trained length for every format, so formats compare. The notch marks "
        "the length seen in training."
    ),
    "load": (
        "The share of a layer's token-to-expert assignments that each expert receives, times the number of experts: 1 "
        "is an even load. CV is the standard deviation over the mean, averaged over layers."
    ),
}


@dataclass(frozen=True)
class KeyFigure:
    """One number of the headline strip."""

    label: str
    value: str
    note: str


def key_figures(results: Results) -> list[KeyFigure]:
    """Return the five numbers of the headline strip; a dash where the step was not run."""
    return [
        _loss_figure(results),
        _size_figure(results),
        _devices_figure(results),
        _traffic_figure(results),
        _context_figure(results),
    ]


def reading(panel: str, results: Results) -> str:
    """Return the sentence for the panel of that name; its step must have been run."""
    sentences = {
        "loss": _loss_reading,
        "sizes": _sizes_reading,
        "devices": _devices_reading,
        "traffic": _traffic_reading,
        "context": _context_reading,
        "load": _load_reading,
    }
    return sentences[panel](results)


def headline_layout(results: Results) -> PackedLayout | None:
    """Return the packed layout that was placed on devices, else the first one."""
    layouts = results.pack.layouts if results.pack else ()
    placed = results.place.layout if results.place else None
    return next((entry for entry in layouts if entry.layout == placed), layouts[0] if layouts else None)


def longest_cache(results: Results) -> CacheFormat | None:
    """Return the cache format that holds the most tokens."""
    formats = results.context.formats if results.context else ()
    return max(formats, key=lambda entry: entry.num_tokens, default=None)


def _loss_figure(results: Results) -> KeyFigure:
    ternary, twin = final_validation(results.ternary), final_validation(results.twin)
    if ternary is None and twin is None:
        return KeyFigure("Validation loss vs. twin", DASH, "not run")
    left, right = twin[0] if twin else None, ternary[0] if ternary else None
    note = f"{format_number(right)} against {format_number(left)} nats/token"
    return KeyFigure("Validation loss vs. twin", format_change(divide(right, left)), note)


def _size_figure(results: Results) -> KeyFigure:
    layout = headline_layout(results)
    if results.pack is None or layout is None:
        return KeyFigure("Model file vs. FP16", DASH, "not run")
    ratio = divide(layout.file_bytes, results.pack.fp16_file_bytes)
    note = f"{format_bytes(layout.file_bytes)} instead of {format_bytes(results.pack.fp16_file_bytes)}, all included"
    return KeyFigure("Model file vs. FP16", _share(ratio), note)


def _devices_figure(results: Results) -> KeyFigure:
    if (place := results.place) is None:
        return KeyFigure("Devices needed", DASH, "not run")
    note = f"lower bounds {place.float16.lower_bound} and {place.ternary.lower_bound}"
    return KeyFigure("Devices needed", f"{place.float16.num_devices} → {place.ternary.num_devices}", note)


def _traffic_figure(results: Results) -> KeyFigure:
    twin, runs = twin_run(results), ternary_runs(results)
    label = "Device traffic a token"
    if not runs:
        return KeyFigure(label, DASH, "not run")
    start = _short_bytes(twin.bytes_per_token) if twin else DASH
    note = f"on {_devices(runs[0].num_devices)}" + (f" instead of {twin.num_devices}" if twin else "")
    if len(runs) > 1:
        note += f"; {format_bytes(runs[-1].bytes_per_token)} when spread over {runs[-1].num_devices}"
    return KeyFigure(label, f"{start} → {_short_bytes(runs[0].bytes_per_token)}", note)


def _context_figure(results: Results) -> KeyFigure:
    best, fp16 = longest_cache(results), fp16_cache(results)
    if results.context is None or best is None or fp16 is None:
        return KeyFigure("Longest context vs. FP16", DASH, "not run")
    budget = format_bytes(results.context.budget_bytes)
    note = f"{best.format} cache: {format_count(best.num_tokens)} tokens in {budget}"
    return KeyFigure("Longest context vs. FP16", format_ratio(divide(best.num_tokens, fp16.num_tokens)), note)


def _loss_reading(results: Results) -> str:
    ternary, twin = final_validation(results.ternary), final_validation(results.twin)
    if ternary is None or twin is None:
        name, one = ("ternary model", ternary) if ternary else ("float twin", twin)
        if one is None:
            return "Training has begun; there is no validation loss yet."
        return f"The {name} has a validation loss of {format_number(one[0])}; the other has none yet."
    change = divide(ternary[0], twin[0])
    if change is None:
        return "A validation loss is not finite: at least one of the two trainings diverged."
    distance = format_change(abs(change - 1) + 1).lstrip("+")
    side = "above" if change > 1 else "below"
    relation = "equals its twin" if distance == "0.0 %" else f"ends {distance} {side} its float twin"
    loss, twin_loss = format_number(ternary[0]), format_number(twin[0])
    return f"In validation loss the ternary model {relation}: {loss} against {twin_loss} nats per token."


def _sizes_reading(results: Results) -> str:
    layout, pack = headline_layout(results), results.pack
    if pack is None or layout is None:
        return "No packed layout was written."
    experts = divide(layout.expert_bytes, pack.fp16_expert_bytes)
    file = divide(layout.file_bytes, pack.fp16_file_bytes)
    bits = format_number(layout.bits_per_expert_weight, 2)
    return (
        f"Packed as {layout.layout} at {bits} bits a weight, the experts take {_share(experts)} of their FP16 bytes; "
        f"the whole file, with all that is not an expert, takes {_share(file)}."
    )


def _devices_reading(results: Results) -> str:
    place = results.place
    assert place is not None
    left, right = place.float16, place.ternary
    sentence = (
        f"The FP16 experts need {_devices(left.num_devices)}, the ternary ones {right.num_devices}; "
        f"one expert shrinks from {format_bytes(left.expert_bytes)} to {format_bytes(right.expert_bytes)}."
    )
    surplus = left.num_devices - left.lower_bound, right.num_devices - right.lower_bound
    if surplus == (0, 0):
        return sentence + " Neither placement could use fewer."
    return sentence + f" That is {surplus[0]} and {surplus[1]} more than the lower bounds."


def _traffic_reading(results: Results) -> str:
    twin, runs = twin_run(results), ternary_runs(results)
    if not runs:
        return "Only the float twin has generated; the ternary model is missing from the runs."
    parts = []
    for run in runs:
        ratio = divide(run.bytes_per_token, twin.bytes_per_token if twin else None)
        place = f"On {_devices(run.num_devices)} the ternary model sends"
        if run.bytes_per_token == 0:
            parts.append(f"{place} nothing between devices.")
        else:
            share = f", {_share(ratio)} of its twin's" if ratio is not None else ""
            parts.append(f"{place} {format_bytes(run.bytes_per_token)} a token{share}.")
    return " ".join(parts)


def _context_reading(results: Results) -> str:
    context, best, fp16 = results.context, longest_cache(results), fp16_cache(results)
    assert context is not None
    assert best is not None
    budget = format_bytes(context.budget_bytes)
    if fp16 is None or best is fp16:
        return f"Within {budget} the {best.format} cache holds {format_count(best.num_tokens)} tokens."
    multiple = format_ratio(divide(best.num_tokens, fp16.num_tokens))
    change = format_change(divide(best.ppl_common, fp16.ppl_common))
    return (
        f"Within {budget} the {best.format} cache holds {multiple} the tokens of FP16; on the same "
        f"{format_count(context.common_num_tokens)} tokens its perplexity changes by {change}."
    )


def _load_reading(results: Results) -> str:
    section = load_section(results)
    assert section is not None
    assert section.summary is not None
    load = section.summary.expert_load
    shares = [share * len(layer) / (sum(layer) or 1.0) for layer in load for share in layer]
    name = "ternary model" if section is results.ternary else "float twin"
    cv = format_number(load_cv(load), 2)
    return (
        f"In the {name} the busiest expert receives {format_number(max(shares), 2)} times the even share "
        f"and the idlest {format_number(min(shares), 2)} times (CV {cv})."
    )


def _devices(count: int) -> str:
    return f"{count} device" if count == 1 else f"{count} devices"


def _share(ratio: float | None) -> str:
    return DASH if ratio is None else f"{100 * ratio:.0f} %"


def _short_bytes(num_bytes: float) -> str:
    return "0" if num_bytes == 0 else format_bytes(num_bytes)
