"""Drawings become files: inline SVG that follows the theme of its page, and one PNG of all six.

Figures are made with matplotlib's object interface; no window, no pyplot, no state that
outlives the call (``rc_context`` restores the settings it changes).
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
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


def panel_svg(panel: Panel, results: Results, description: str) -> str:
    """Render one panel as an ``<svg>`` element for an HTML page.

    Colours are CSS variables (``--ink``, ``--muted``, ``--grid``, ``--surface``, ``--twin``,
    ``--ternary``, ``--ternary-light``), text is text, ids start with the panel's name, and no
    address of any kind is left in it.

    Args:
        panel: an available panel.
        results: what it draws.
        description: read aloud in place of the picture; plain text.
    """
    with _settings(font_size=13.0):
        height = _SVG_HEIGHTS[panel.name]
        figure = Figure(figsize=(_SVG_WIDTH / 72, height / 72), layout="constrained")
        panel.draw(figure.add_subplot(), results, _THEMED)
        buffer = io.StringIO()
        no_metadata: dict[str, Any] = {"Creator": None, "Date": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _to_inline_svg(buffer.getvalue(), panel.name, description)


def save_plot_png(results: Results, path: Path) -> None:
    """Write one picture of all six panels, 1600 × 900 pixels on white, whole or not at all."""
    png = overview_png(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        temporary.write_bytes(png)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def overview_png(results: Results) -> bytes:
    """Render all six panels as one PNG; a panel whose step was not run says so."""
    with _settings(font_size=12.5):
        layout = ConstrainedLayoutEngine(w_pad=0.28, h_pad=0.24, wspace=0.04, hspace=0.05)
        figure = Figure(figsize=_PNG_SIZE, facecolor=LIGHT.surface, layout=layout)
        title = "A ternary mixture of experts beside its float twin"
        figure.suptitle(title, x=0.018, ha="left", color=LIGHT.ink, fontsize=19, fontweight="bold")
        for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
            _draw_panel(axes, panel, results)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_PNG_DPI)
    return buffer.getvalue()


def _draw_panel(axes: Axes, panel: Panel, results: Results) -> None:
    if panel.is_available(results):
        panel.draw(axes, results, LIGHT)
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "not run", color=LIGHT.muted, ha="center", va="center", transform=axes.transAxes)
    axes.set_title(panel.title, loc="left", color=LIGHT.ink, fontsize=14, fontweight="bold", pad=24)


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
