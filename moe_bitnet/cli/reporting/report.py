"""Write the report of a run: ``report.json``, ``report.html`` and ``overview.png``."""

import json
from pathlib import Path
from typing import Any

from moe_bitnet.cli.reporting.figures import save_plot_png
from moe_bitnet.cli.reporting.html import render_html
from moe_bitnet.cli.reporting.summary import load_results, to_report
from moe_bitnet.files import write_text_atomically


def write_report(run_folder: Path) -> dict[str, Any]:
    """Write ``report/`` into ``run_folder`` from whatever steps were run.

    Everything is computed before the first file is written, and each file is replaced whole.

    Returns:
        The content of ``report.json`` (see :func:`to_report`).
    Raises:
        DataError: the folder is missing, or a result file is malformed; the message names file and field.
    """
    results = load_results(run_folder)
    report = to_report(results)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    page = render_html(results)
    folder = run_folder / "report"
    save_plot_png(results, folder / "overview.png")
    write_text_atomically(folder / "report.html", page)
    write_text_atomically(folder / "report.json", text)
    return report
