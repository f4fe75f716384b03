import io

from rich.console import Console

from benchmarks.metrics import Metric
from benchmarks.table import detail_text, format_value, metrics_table


def printed(metrics):
    stream = io.StringIO()
    Console(file=stream, width=200, color_system=None).print(metrics_table(metrics, "a title"))
    return stream.getvalue()


def test_the_table_of_lines_equals_the_table_of_metrics():
    metrics = [
        Metric("a.share", 0.9, "ratio", "torch fp16", 1.25, {"threads": 2, "at_least": 0.85}),
        Metric("a.seconds", 0.00123456, "s", detail={"timing": {"median_s": 1.0, "other_cpu_share": 0.25}}),
        Metric("a.unknown", None, "GB", detail={"reason": "[no] peer"}),
    ]
    read_back = [Metric.from_json_line(metric.to_json_line()) for metric in metrics]
    text = printed(metrics)
    assert printed(read_back) == text
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("a.")}
    assert "≥ 0.85 ✓" in rows["a.share"]
    assert "torch fp16: 1.25" in rows["a.share"]
    assert "0.001235 s" in rows["a.seconds"]
    assert "25%" in rows["a.seconds"]
    assert "reason [no] peer" in rows["a.unknown"]


def test_undisturbed_figures_need_no_legend():
    assert "others:" not in printed([Metric("a.b", 1.0, "ratio")])


def test_values_keep_four_digits_and_their_unit():
    assert format_value(0.123456, "ratio") == "0.1235"
    assert format_value(1234567.0, "bytes") == "1,234,567 bytes"
    assert format_value(None, "s") == "-"


def test_detail_leaves_out_what_has_its_own_column():
    detail = {
        "shape": [7, 33],
        "share": 0.123456,
        "is_quick": True,
        "is_packed": False,
        "at_most": 3,
        "spread": {"a": 1},
    }
    assert detail_text(detail) == "shape 7×33, share 0.1235, quick"
