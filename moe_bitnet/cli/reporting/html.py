"""Render results as one self-contained HTML page: inline CSS and SVG, no script, no request to anywhere."""

from importlib.resources import files
from typing import Any

from moe_bitnet.cli.reporting.figures import panel_svg
from moe_bitnet.cli.reporting.markup import Markup, element, join, table
from moe_bitnet.cli.reporting.plots import PANELS
from moe_bitnet.cli.reporting.readings import COUNTS, key_figures, reading
from moe_bitnet.cli.reporting.sections import Results, TrainingSection
from moe_bitnet.cli.reporting.summary import step_command, to_report
from moe_bitnet.cli.reporting.units import (
    DASH,
    divide,
    format_bytes,
    format_count,
    format_number,
    format_ratio,
    format_seconds,
)

_TITLE = "Ternary experts beside their float twin"
# The browser itself refuses whatever would leave the page, should anything ever slip in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_PANELS = {panel.name: panel for panel in PANELS}


def render_html(results: Results) -> str:
    """Return the page; a section whose step was not run names the command that produces it."""
    style = files("moe_bitnet.cli.reporting").joinpath("report.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{_TITLE} · {results.name}"),
        element("style", Markup(style)),
    )
    body = element("body", _header(results), element("main", _headline(results), *_sections(results)), _footer(results))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _header(results: Results) -> Markup:
    machine = results.machine
    facts = [f"run {results.name}"]
    if machine is not None:
        facts += [machine.date, f"commit {machine.commit[:12]}", f"{machine.cpu}, {machine.num_cores} cores"]
    return element(
        "header",
        element("p", "moe-bitnet · demo report", class_="kicker"),
        element("h1", _TITLE),
        element("p", _lede(results), class_="lede"),
        element("ul", *(element("li", fact) for fact in facts), class_="facts"),
    )


def _lede(results: Results) -> str:
    section = results.ternary or results.twin
    if section is None or section.summary is None:
        return "One mixture-of-experts model, trained twice on the same text: with ternary weights and in float."
    summary = section.summary
    source = f" on {results.data.source}" if results.data and results.data.source else ""
    return (
        f"One mixture-of-experts model of {format_count(summary.num_parameters)} parameters, "
        f"{format_count(summary.num_active_parameters)} of them active for a token, trained twice{source}: once with "
        f"weights in {{−1, 0, +1}}, once in float. {format_count(summary.num_tokens)} tokens each, same data, same order."
    )


def _headline(results: Results) -> Markup:
    cells = [
        element(
            "div",
            element("dt", figure.label),
            element("dd", figure.value, class_="value"),
            element("dd", figure.note, class_="note"),
        )
        for figure in key_figures(results)
    ]
    return element("dl", *cells, class_="headline")


def _sections(results: Results) -> list[Markup]:
    """Build the numbered sections in the order of the demo's steps."""
    parts = [
        ("Text", ["data"], _data_content(results)),
        ("Quality", ["ternary", "twin"], _with_figure("loss", results, _training_table(results))),
        ("Size on disk", ["pack"], _with_figure("sizes", results, _pack_table(results))),
        ("Placement", ["place"], _with_figure("devices", results, _place_table(results))),
        ("Generation", ["generate"], _with_figure("traffic", results, _traffic_table(results))),
        ("Long context", ["context"], _with_figure("context", results, _context_table(results))),
        ("Expert load", ["ternary"], _with_figure("load", results, _load_table(results))),
        ("Machine", ["machine"], _machine_content(results)),
    ]
    sections = []
    for number, (title, needed, content) in enumerate(parts, start=1):
        heading = element("h2", element("span", f"{number}", class_="number"), title)
        missing = [_missing(name) for name in needed if getattr(results, name) is None]
        if title == "Generation":
            content = join(content, _generated_text(results))
        sections.append(element("section", heading, *missing, content))
    sections.append(_all_numbers(results))
    return sections


def _missing(name: str) -> Markup:
    what = {"ternary": "The ternary model was not trained. ", "twin": "The float twin was not trained. "}
    return element(
        "p", what.get(name, "This step was not run. "), element("code", step_command(name)), " produces it.",
        class_="missing",
    )  # fmt: skip


def _with_figure(name: str, results: Results, numbers: Markup) -> Markup:
    panel = _PANELS[name]
    if not panel.is_available(results):
        return numbers
    sentence = reading(name, results)
    caption = element("figcaption", element("strong", "What this number counts. "), COUNTS[name])
    figure = element("figure", Markup(panel_svg(panel, results, f"{panel.title}. {sentence}")), caption)
    return join(
        element("p", sentence, class_="reading"), element("div", figure, element("div", numbers), class_="pair")
    )


def _data_content(results: Results) -> Markup:
    if (data := results.data) is None:
        return Markup()
    rows = [
        [what, format_count(counts.train), format_count(counts.validation)]
        for what, counts in (("documents", data.num_documents), ("tokens", data.num_tokens))
        if counts is not None
    ]
    if data.num_bytes is not None:
        rows.append(["bytes of text", format_bytes(data.num_bytes.train), format_bytes(data.num_bytes.validation)])
    facts = [f"{format_count(data.vocab_size)} entries in the vocabulary"] if data.vocab_size is not None else []
    if data.bytes_per_token is not None:
        facts.append(f"{format_number(data.bytes_per_token, 2)} bytes of text a token")
    sentence = " · ".join([data.source or "source not recorded", *facts])
    return join(element("p", sentence, class_="reading"), table(["", "training", "validation"], rows))


def _training_table(results: Results) -> Markup:
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
        row("peak learning rate", lambda summary: f"{summary.peak_learning_rate:.2g}"),
        row("compiled", lambda summary: "yes" if summary.is_compiled else "no"),
    ]
    return table(["", "float twin", "ternary"], rows)


def _pack_table(results: Results) -> Markup:
    if (pack := results.pack) is None:
        return Markup()
    rows = [["FP16", format_bytes(pack.fp16_file_bytes), format_bytes(pack.fp16_expert_bytes), "16.00"]]
    for entry in pack.layouts:
        bits = format_number(entry.bits_per_expert_weight, 2)
        rows.append([entry.layout, format_bytes(entry.file_bytes), format_bytes(entry.expert_bytes), bits])
    note = (
        f"The packed model's logits differ from the unpacked ones by at most "
        f"{pack.max_abs_logit_difference:.2g}; the largest logit is {format_number(pack.max_abs_logit, 1)}."
    )
    return join(table(["layout", "file", "experts", "bits a weight"], rows), element("p", note, class_="aside"))


def _place_table(results: Results) -> Markup:
    if (place := results.place) is None:
        return Markup()
    rows = [
        ["devices needed", str(place.float16.num_devices), str(place.ternary.num_devices)],
        ["lower bound", str(place.float16.lower_bound), str(place.ternary.lower_bound)],
        ["one expert", format_bytes(place.float16.expert_bytes), format_bytes(place.ternary.expert_bytes)],
        ["all experts", format_bytes(place.float16.total_bytes), format_bytes(place.ternary.total_bytes)],
    ]
    devices = [
        [device.name, format_bytes(device.memory_bytes), format_bytes(device.reserved_bytes)]
        for device in place.devices
    ]
    return join(table(["", "FP16", place.layout], rows), table(["device", "memory", "reserved"], devices))


def _traffic_table(results: Results) -> Markup:
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


def _generated_text(results: Results) -> Markup:
    if (generate := results.generate) is None:
        return Markup()
    return element(
        "figure",
        element("blockquote", element("b", generate.prompt), generate.text),
        element(
            "figcaption",
            f"Prompt in bold, then {format_count(generate.num_new_tokens)} tokens generated with remote experts, "
            "printed exactly as they came. The model is far too small to know facts.",
        ),
        class_="sample",
    )


def _context_table(results: Results) -> Markup:
    if (context := results.context) is None:
        return Markup()
    fp16 = next((entry.num_tokens for entry in context.formats if entry.format == "fp16"), None)
    rows = [
        [
            entry.format,
            format_count(entry.num_tokens),
            format_ratio(divide(entry.num_tokens, fp16)),
            format_bytes(entry.bytes_per_token),
            format_number(entry.ppl_common, 2),
            format_number(entry.ppl_all, 2),
        ]
        for entry in context.formats
    ]
    note = (
        f"Model: {context.model}. “PPL” is over the same first {format_count(context.common_num_tokens)} tokens; “PPL, "
        f"all” over all tokens held, and there it also shows that the model was trained on "
        f"{format_count(context.trained_seq_len)} tokens at a time, not on longer ones."
    )
    header = ["cache", "tokens", "ratio", "a token", "PPL", "PPL, all"]
    return join(table(header, rows), element("p", note, class_="aside"))


def _load_table(results: Results) -> Markup:
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


def _machine_content(results: Results) -> Markup:
    if (machine := results.machine) is None:
        return Markup()
    facts = [
        ["processor", machine.cpu],
        ["cores", str(machine.num_cores)],
        ["memory", format_bytes(machine.memory_bytes)],
        ["Python", machine.python],
        *([name, version] for name, version in machine.versions.items()),
    ]
    steps = [[name, format_seconds(seconds)] for name, seconds in machine.steps_s.items()]
    steps.append(["whole demo", format_seconds(machine.demo_s)])
    return element("div", table(["what ran it", ""], facts), table(["step", "time"], steps), class_="pair even")


def _all_numbers(results: Results) -> Markup:
    metrics = to_report(results)["metrics"]
    if not metrics:
        return Markup()
    rows = []
    for entry in metrics:
        which = [str(entry["detail"][key]) for key in ("run", "layout", "format") if key in entry["detail"]]
        rows.append(
            [
                " · ".join([entry["metric"], *which]),
                _plain_number(entry["value"]),
                entry["unit"],
                entry["baseline"],
                _plain_number(entry["baseline_value"]),
            ]
        )
    numbers = table(["metric", "value", "unit", "baseline", "its value"], rows)
    return element("details", element("summary", f"All {len(rows)} numbers, as in report.json"), numbers)


def _footer(results: Results) -> Markup:
    duration = f" The demo took {format_seconds(results.machine.demo_s)}." if results.machine is not None else ""
    note = "Bytes are binary: 1 KiB = 1,024 bytes. A dash stands for a number that is missing or not finite."
    return element("footer", element("p", f"{note}{duration}"))


def _summary(section: TrainingSection | None) -> Any:
    return section.summary if section is not None else None


def _plain_number(value: float | None) -> str:
    return DASH if value is None else f"{value:,.5g}" if isinstance(value, float) else f"{value:,}"
