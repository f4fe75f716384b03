"""Render results as one self-contained HTML page: inline CSS and SVG, no script, no request to anywhere."""

from importlib.resources import files

from moe_bitnet.cli.reporting.figures import panel_svg
from moe_bitnet.cli.reporting.markup import Markup, element, join, table
from moe_bitnet.cli.reporting.plots import PANELS
from moe_bitnet.cli.reporting.readings import COUNTS, key_figures, reading
from moe_bitnet.cli.reporting.section_tables import (
    context_table,
    load_table,
    pack_table,
    place_table,
    traffic_table,
    training_table,
)
from moe_bitnet.cli.reporting.sections import Results
from moe_bitnet.cli.reporting.summary import is_complete, step_command, to_report
from moe_bitnet.cli.reporting.units import DASH, format_bytes, format_count, format_number, format_seconds

_TITLE = "Ternary experts beside their float twin"
# The browser itself refuses whatever would leave the page, should anything ever slip in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_PANELS = {panel.name: panel for panel in PANELS}


def render_html(results: Results) -> str:
    """Return the page; a section whose step was not run names the command that produces it."""
    body = element("body", _header(results), element("main", _headline(results), *_sections(results)), _footer(results))
    return page(f"{_TITLE} · {results.name}", body)


def page(title: str, body: Markup) -> str:
    """Return a whole page, styled as all reports are."""
    style = files("moe_bitnet.cli.reporting").joinpath("report.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(style)),
    )
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
        f"expert weights in {{−1, 0, +1}}, once in float, on {format_count(summary.num_tokens)} tokens."
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
        ("Quality", ["ternary", "twin"], _with_figure("loss", results, training_table(results))),
        ("Size on disk", ["pack"], _with_figure("sizes", results, pack_table(results))),
        ("Placement", ["place"], _with_figure("devices", results, place_table(results))),
        ("Generation", ["generate"], _with_figure("traffic", results, traffic_table(results))),
        ("Long context", ["context"], _with_figure("context", results, context_table(results))),
        ("Expert load", ["ternary"], _with_figure("load", results, load_table(results))),
        ("Machine", ["machine"], _machine_content(results)),
    ]
    sections = []
    for number, (title, needed, content) in enumerate(parts, start=1):
        heading = element("h2", element("span", f"{number}", class_="number"), title)
        missing = [_missing(name, results) for name in needed if not is_complete(getattr(results, name))]
        if title == "Generation":
            content = join(content, _generated_text(results))
        sections.append(element("section", heading, *missing, content))
    sections.append(_all_numbers(results))
    return sections


def _missing(name: str, results: Results) -> Markup:
    who = {"ternary": "The ternary model", "twin": "The float twin"}.get(name)
    if who is None:
        what = "This step was not run. "
    elif getattr(results, name) is None:
        what = f"{who} was not trained. "
    else:
        what = f"{who} has not finished training. "
    return element("p", what, element("code", step_command(name)), " produces it.", class_="missing")


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
        ["documents", format_count(data.num_train_documents), format_count(data.num_validation_documents)],
        ["tokens", format_count(data.num_train_tokens), format_count(data.num_validation_tokens)],
        ["text", format_bytes(data.train_bytes), format_bytes(data.validation_bytes)],
    ]
    sentence = (
        f"{data.source} · {format_count(data.vocab_size)} entries in the vocabulary · "
        f"{format_number(data.bytes_per_token, 2)} bytes of text a token"
    )
    return join(element("p", sentence, class_="reading"), table(["", "training", "validation"], rows))


def _generated_text(results: Results) -> Markup:
    if (generate := results.generate) is None:
        return Markup()
    return element(
        "figure",
        element("blockquote", element("b", generate.prompt), generate.text),
        element(
            "figcaption",
            f"Prompt in bold, then {format_count(generate.num_new_tokens)} tokens generated with remote experts, "
            "unedited. A model of this size has learnt the look of its text, not facts.",
        ),
        class_="sample",
    )


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
    note = "Bytes are decimal: 1 kB = 1,000 bytes. A dash stands for a number that is missing or not finite."
    return element("footer", element("p", f"{note}{duration}"))


def _plain_number(value: float | None) -> str:
    return DASH if value is None else f"{value:,.5g}" if isinstance(value, float) else f"{value:,}"
