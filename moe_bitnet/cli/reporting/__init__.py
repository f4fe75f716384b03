"""Turn the results of a demo run into a terminal table, ``report.json``, ``report.html`` and a picture.

A run folder enters; nothing is measured here. Read in this order::

    sections.py    what each step leaves in the run folder (the schema)
    record.py      JSON -> sections, naming file and field of what is wrong
    summary.py     load_results, to_report
    metrics.py     the headline numbers        comparison.py   the table a person reads
    plots.py       six drawings on axes        figures.py      drawings -> SVG, PNG
    readings.py    one sentence a figure       html.py         the page, with section_tables.py
    training_report.py  the same for one training run, with training_curves.py
"""

from moe_bitnet.cli.reporting.figures import save_plot_png
from moe_bitnet.cli.reporting.report import write_report
from moe_bitnet.cli.reporting.sections import Results
from moe_bitnet.cli.reporting.summary import load_results, to_report
from moe_bitnet.cli.reporting.table import print_report
from moe_bitnet.cli.reporting.training_report import write_training_report

__all__ = [
    "Results",
    "load_results",
    "print_report",
    "save_plot_png",
    "to_report",
    "write_report",
    "write_training_report",
]
