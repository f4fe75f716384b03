"""Drawings become files: inline SVG that follows the theme of its page, and one PNG of all six.

Figures are made with matplotlib's object interface; no window, no pyplot, no state that
outlives the call (``rc_context`` restores the settings it changes).
"""

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from moe_bitnet.cli.reporting.plots import PANELS, Palette, Panel
from moe_bitnet.cli.reporting.sections import Results

LIGHT = Palette(
    ink="#1d2430", muted="#5c6675", grid="#e4e7ec", surface="#ffffff",
    twin="#2b6ca8", ternary="#d0561a", ternary_light="#eaa27b",
)  # fmt: skip

# Stand-ins that matplotlib writes into the SVG and that are then replaced by CSS variables.
_THEMED = Palette(
    ink="#fe0101", muted="#fe0102", grid="#fe0103", surface="#fe0104",
    twin="#fe0105", ternary="#fe0106", ternary_light="#fe0107",
)  # fmt: skip

_SVG_WIDTH = 480
_SVG_HEIGHTS = {"loss": 300, "sizes": 310, "devices": 150, "traffic": 190, "context": 200, "load": 260}
_PNG_SIZE = (16.0, 9.0)
_PNG_DPI = 100


@dataclass(frozen=True)
class Drawing:
    """Something to draw on axes, with a name for its ids and a title."""

    name: str
    title: str
    draw: Callable[[Axes, Palette], None]


def panel_svg(panel: Panel, results: Results, description: str) -> str:
    """Render one panel as an ``<svg>`` element; see :func:`drawing_svg`."""
    drawing = Drawing(panel.name, panel.title, lambda axes, palette: panel.draw(axes, results, palette))
    return drawing_svg(drawing, _SVG_HEIGHTS[panel.name], description)


def drawing_svg(drawing: Drawing, height: int, description: str) -> str:
    """Render a drawing as an ``<svg>`` element for an HTML page.

    Colours are CSS variables (``--ink``, ``--muted``, ``--grid``, ``--surface``, ``--twin``,
    ``--ternary``, ``--ternary-light``), text is text, ids start with the drawing's name, and no
    address of any kind is left in it.

    Args:
        drawing: what to draw.
        height: in points; the width is 480.
        description: read aloud in place of the picture; plain text.
    """
    with _settings(font_size=13.0):
        figure = Figure(figsize=(_SVG_WIDTH / 72, height / 72), layout="constrained")
        drawing.draw(figure.add_subplot(), _THEMED)
        buffer = io.StringIO()
        no_metadata: dict[str, Any] = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _to_inline_svg(buffer.getvalue(), drawing.name, description)


def save_plot_png(results: Results, path: Path) -> None:
    """Write one picture of all six panels, 1600 × 900 pixels on white, whole or not at all."""
    save_png(overview_png(results), path)


def save_png(png: bytes, path: Path) -> None:
    """Write a picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        temporary.write_bytes(png)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def overview_png(results: Results) -> bytes:
    """Render all six panels as one PNG; a panel whose step was not run says so."""
    drawings = [
        Drawing(panel.name, panel.title, partial(_draw_panel, panel=panel, results=results)) for panel in PANELS
    ]
    return drawings_png("A ternary mixture of experts beside its float twin", drawings)


def drawings_png(title: str, drawings: Sequence[Drawing]) -> bytes:
    """Render drawings as one PNG of 1600 × 900 pixels, up to three in a row."""
    with _settings(font_size=12.5):
        layout = ConstrainedLayoutEngine(w_pad=0.28, h_pad=0.24, wspace=0.04, hspace=0.05)
        figure = Figure(figsize=_PNG_SIZE, facecolor=LIGHT.surface, layout=layout)
        figure.suptitle(title, x=0.018, ha="left", color=LIGHT.ink, fontsize=19, fontweight="bold")
        num_columns = min(3, len(drawings))
        all_axes = figure.subplots(-(-len(drawings) // num_columns), num_columns, squeeze=False).flat
        for axes, drawing in zip_longest(all_axes, drawings):
            if drawing is None:
                axes.set_axis_off()
                continue
            drawing.draw(axes, LIGHT)
            axes.set_title(drawing.title, loc="left", color=LIGHT.ink, fontsize=14, fontweight="bold", pad=24)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_PNG_DPI)
    return buffer.getvalue()


def _draw_panel(axes: Axes, palette: Palette, panel: Panel, results: Results) -> None:
    if panel.is_available(results):
        panel.draw(axes, results, palette)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "not run", color=palette.muted, ha="center", va="center", transform=axes.transAxes)


@contextmanager
def _settings(font_size: float) -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcdefaults()  # the reader's own matplotlibrc must not change the report
        mpl.rcParams.update({"font.size": font_size, "svg.fonttype": "none", "svg.hashsalt": "report"})
        yield


def _to_inline_svg(document: str, prefix: str, description: str) -> str:
    """Cut the XML prologue, the fixed size, the namespaces and the font; name ids after the panel."""
    svg = document[document.index("<svg") :]
    opening, body = svg.split(">", 1)
    view_box = re.search(r'viewBox="([^"]+)"', opening)
    assert view_box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid=")', rf"\1{prefix}-", body)
    body = body.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r"font: ([^;\"]*?)([\d.]+)px [^;\"]*", _font, body)
    for name, color in vars(_THEMED).items():
        body = body.replace(color, f"var(--{name.replace('_', '-')})")
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg viewBox="{view_box[1]}" role="img" aria-label="{label}" preserveAspectRatio="xMinYMid meet">{body}'


def _font(match: re.Match[str]) -> str:
    weight = "600" if "bold" in match[1] or "700" in match[1] else "400"
    return f"font-size: {match[2]}px; font-weight: {weight}"
