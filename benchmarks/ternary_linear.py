"""Ternary products against the machine's limits and against torch.

    python -m benchmarks.ternary_linear [--quick] [--json] [--output]

One row reads weights from memory (a share of the read bandwidth), many rows compute (a share of the integer peak).
Every share's denominator is measured in turns with it, by a probe that uses the same instructions and threads. At
few rows the weights rotate through 512 MiB or more, far beyond the last-level cache; torch's do, too.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, add_arguments
from benchmarks.limits import peak_call, read_call
from benchmarks.memory import keep_freed_memory
from benchmarks.plots import plot_shares
from benchmarks.rotation import Rotation, default_total_bytes
from benchmarks.synthetic import random_packed
from benchmarks.timing import compare
from moe_bitnet.kernels import select
from moe_bitnet.packing import LAYOUTS, Layout, PackedTernary, packed_width
from moe_bitnet.tiles import TiledTernary


@dataclass(frozen=True)
class MatrixShape:
    """A weight matrix of a known model.

    Attributes:
        name: where it is from.
        out_features: rows.
        in_features: columns.
    """

    name: str
    out_features: int
    in_features: int


SHAPES = (
    MatrixShape("2B4T gate", 6912, 2560),
    MatrixShape("2B4T down", 2560, 6912),
    MatrixShape("Mixtral expert gate", 14_336, 4096),
    MatrixShape("Mixtral expert down", 4096, 14_336),
)
MAIN_SHAPE = SHAPES[0]
ROWS = (1, 2, 4, 8, 16, 32, 64)


def make_weights(shape: MatrixShape, layout: Layout, count: int, seed: int = 0) -> TiledTernary:
    """Return ``count`` random matrices in tiles."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size((count, shape.out_features, packed_width(shape.in_features, layout)))
    packed = PackedTernary(random_packed(size, layout, generator), torch.ones(count, 1, 1), shape.in_features, layout)
    tiled: TiledTernary = select("tile")(packed)
    return tiled


def random_rows(num_rows: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Return int8 rows and their scales."""
    return torch.randint(-127, 128, (num_rows, in_features), dtype=torch.int8), torch.ones(num_rows, 1)


def grouped_call(weights: TiledTernary, rows_each: int) -> Callable[[], object]:
    """Multiply ``rows_each`` rows with every matrix, in one call."""
    count = weights.tiles.shape[0]
    x_q, scale = random_rows(count * rows_each, weights.in_features)
    offsets = torch.arange(count + 1) * rows_each
    multiply = select("grouped_ternary_linear")
    return lambda: multiply(x_q, scale, weights, offsets)


def num_copies(shape: MatrixShape, layout: Layout, is_quick: bool) -> int:
    """Return how many matrices exceed the caches many times."""
    total = default_total_bytes() // (2 if is_quick else 1)
    return -(-total // (shape.out_features * packed_width(shape.in_features, layout)))


def measure_decode(report: Report, shape: MatrixShape, layout: Layout, num_threads: int) -> None:
    """One row a matrix: share of the bandwidth at which a probe reads the same bytes."""
    torch.set_num_threads(num_threads)
    weights = make_weights(shape, layout, num_copies(shape, layout, report.is_quick))
    turns = compare(
        {"ours": grouped_call(weights, 1), "read": read_call(weights.tiles)},
        num_rounds=5 if report.is_quick else 15,
    )
    num_bytes = weights.tiles.nbytes
    report.add(
        "decode_share_of_bandwidth",
        turns.speedup("ours", "read"),
        "ratio",
        baseline="read probe, GB/s",
        baseline_value=num_bytes / turns["read"].median_s / 1e9,
        detail={
            "format": layout,
            "threads": num_threads,
            "shape": [shape.out_features, shape.in_features],
            "gb_per_s": num_bytes / turns["ours"].median_s / 1e9,
            "gops": 2 * len(weights.tiles) * shape.out_features * shape.in_features / turns["ours"].median_s / 1e9,
            **turns.to_detail(),
        },
        at_least=0.85 if num_threads > 1 else None,
    )


def measure_base3_gain(report: Report) -> None:
    """How much faster 1.6 bits decode than 2 bits, in turns."""
    calls = {
        layout: grouped_call(make_weights(MAIN_SHAPE, layout, num_copies(MAIN_SHAPE, "2bit", report.is_quick)), 1)
        for layout in LAYOUTS
    }
    turns = compare(calls, num_rounds=5 if report.is_quick else 15)
    report.add(
        "base3_vs_2bit",
        turns.speedup("base3", "2bit"),
        "ratio",
        baseline="2bit",
        detail={"threads": torch.get_num_threads(), "shape": [MAIN_SHAPE.out_features, MAIN_SHAPE.in_features]},
    )


def measure_torch_decode(report: Report) -> None:
    """One row: a call of ternary_linear a matrix against torch's linear layers, all on weights from memory."""
    shape = MAIN_SHAPE
    multiply = select("ternary_linear")
    x_q, scale = random_rows(1, shape.in_features)
    calls: dict[str, Callable[[], object]] = {}
    for layout in LAYOUTS:
        tiled = make_weights(shape, layout, num_copies(shape, layout, report.is_quick))
        matrices = Rotation(iter([tiled.select(i) for i in range(len(tiled.tiles))]).__next__, 1, len(tiled.tiles))
        calls[layout] = _twenty(lambda matrices=matrices: multiply(x_q, scale, next(matrices)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(1, shape.in_features).to(dtype)
        weights = _rotating_floats(shape, dtype)
        calls[str(dtype).removeprefix("torch.")] = _twenty(lambda x=x, weights=weights: F.linear(x, next(weights)))
    # torch's threads spin for milliseconds after an operation, on the core that the next candidate wants
    turns = compare(calls, num_rounds=4 if report.is_quick else 10, num_settling_calls=4)
    fastest = min(("float32", "bfloat16", "float16"), key=lambda name: turns[name].median_s)
    for layout in LAYOUTS:
        report.add(
            "decode_vs_torch",
            turns.speedup(layout, fastest),
            "ratio",
            baseline=f"torch {fastest} linear, us",
            baseline_value=turns[fastest].median_s / 20 * 1e6,
            detail={
                "format": layout,
                "threads": torch.get_num_threads(),
                "us": turns[layout].median_s / 20 * 1e6,
                **turns.to_detail(),
            },
        )


def measure_prefill(report: Report, shape: MatrixShape, layout: Layout, num_rows: int = 512) -> None:
    """Many rows: share of the integer peak, and against torch's int8 product on the same int8 operands."""
    weights = make_weights(shape, layout, 1)
    x_q, scale = random_rows(num_rows, shape.in_features)
    multiply, matrix = select("ternary_linear"), weights.select(0)
    dense = weights.unpack()[0].contiguous()  # int8 [out, in]
    transposed = dense.T.contiguous()
    operations = 2.0 * num_rows * shape.out_features * shape.in_features
    turns = compare(
        {
            "ours": lambda: multiply(x_q, scale, matrix),
            "int_mm": lambda: torch._int_mm(x_q, dense.T),
            "int_mm, transposed": lambda: torch._int_mm(x_q, transposed),
            "peak": peak_call(operations),
        },
        num_rounds=5 if report.is_quick else 11,
        num_settling_calls=2,
    )
    fastest = min(("int_mm", "int_mm, transposed"), key=lambda name: turns[name].median_s)
    detail = {
        "format": layout,
        "threads": torch.get_num_threads(),
        "rows": num_rows,
        "shape": [shape.out_features, shape.in_features],
        "gops": operations / turns["ours"].median_s / 1e9,
        **turns.to_detail(),
    }
    report.add(
        "prefill_share_of_peak",
        turns.speedup("ours", "peak"),
        "ratio",
        baseline="integer peak probe, GOPS",
        baseline_value=operations / turns["peak"].median_s / 1e9,
        detail=detail,
        at_least=0.85,
    )
    report.add(
        "prefill_vs_int_mm",
        turns.speedup("ours", fastest),
        "ratio",
        baseline=f"torch {fastest}, GOPS",
        baseline_value=operations / turns[fastest].median_s / 1e9,
        detail=detail,
        at_least=1.0,
    )


def measure_small_batches(report: Report, layout: Layout) -> None:
    """Time a row at 1 to 64 rows; weights come from memory each time."""
    shape = MAIN_SHAPE
    weights = make_weights(shape, layout, num_copies(shape, layout, is_quick=True))
    count = len(weights.tiles)
    calls = {str(rows): grouped_call(weights, rows) for rows in ROWS}
    operations = 2.0 * 8 * count * shape.out_features * shape.in_features
    turns = compare(
        {**calls, "peak at 8 rows": peak_call(operations)}, num_rounds=3 if report.is_quick else 9, num_warmups=1
    )
    detail = {"format": layout, "threads": torch.get_num_threads(), "shape": [shape.out_features, shape.in_features]}
    for rows in ROWS:
        seconds = turns[str(rows)].median_s
        report.add(
            "us_per_row",
            seconds / count / rows * 1e6,
            "us",
            detail={**detail, "rows": rows, "gops": operations / 8 * rows / seconds / 1e9},
        )
    report.add(
        "rows8_vs_rows1",
        1 / turns.speedup("8", "1"),
        "ratio",
        baseline="one row",
        detail={
            **detail,
            "bound_by_peak": 1 / turns.speedup("peak at 8 rows", "1"),
            "share_of_peak_at_8": turns.speedup("8", "peak at 8 rows"),
            **turns.to_detail(),
        },
        at_most=2.5,
    )


def measure_rows64(report: Report, layout: Layout) -> None:
    """64 rows against torch's int8 product, weights of both from memory."""
    shape, num_rows = MAIN_SHAPE, 64
    weights = make_weights(shape, layout, num_copies(shape, layout, is_quick=True))
    x_q, scale = random_rows(num_rows, shape.in_features)
    multiply, count = select("ternary_linear"), len(weights.tiles)
    matrices = Rotation(iter([weights.select(i) for i in range(count)]).__next__, 1, count)
    dense = Rotation(
        lambda: torch.randint(-1, 2, (shape.out_features, shape.in_features), dtype=torch.int8),
        shape.out_features * shape.in_features,
    )
    turns = compare(
        {
            "ours": _twenty(lambda: multiply(x_q, scale, next(matrices))),
            "int_mm": _twenty(lambda: torch._int_mm(x_q, next(dense).T)),
        },
        num_rounds=4 if report.is_quick else 11,
    )
    report.add(
        "rows64_vs_int_mm",
        turns.speedup("ours", "int_mm"),
        "ratio",
        baseline="torch int_mm, us",
        baseline_value=turns["int_mm"].median_s / 20 * 1e6,
        detail={"format": layout, "threads": torch.get_num_threads(), **turns.to_detail()},
        at_least=1.0,
    )


def _twenty(function: Callable[[], object]) -> Callable[[], object]:
    """Call a function 20 times, so that a figure is longer than the clock's noise."""

    def run() -> None:
        for _ in range(20):
            function()

    return run


def _rotating_floats(shape: MatrixShape, dtype: torch.dtype) -> Rotation[Tensor]:
    size = (shape.out_features, shape.in_features)
    return Rotation(lambda: torch.zeros(size, dtype=dtype).add_(0.01), size[0] * size[1] * dtype.itemsize)


def main() -> None:
    """Measure everything and print it."""
    keep_freed_memory("benchmarks.ternary_linear")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    num_threads = torch.get_num_threads()
    with Report("ternary_linear", arguments) as report:
        shapes = SHAPES[:1] if report.is_quick else SHAPES
        for layout in LAYOUTS:
            for threads in sorted({1, num_threads}):
                for shape in shapes:
                    report.progress(f"decode, {layout}, {threads} threads, {shape.name}")
                    measure_decode(report, shape, layout, threads)
        torch.set_num_threads(num_threads)
        report.progress("base-3 against 2 bits, and both against torch")
        measure_base3_gain(report)
        measure_torch_decode(report)
        for layout in LAYOUTS:
            for shape in shapes:
                report.progress(f"512 rows, {layout}, {shape.name}")
                measure_prefill(report, shape, layout)
            report.progress(f"1 to 64 rows, {layout}")
            measure_small_batches(report, layout)
            measure_rows64(report, layout)
        if report.output_path is not None:
            plot_shares(report.metrics, report.output_path.with_suffix(".png"), "Ternary products")


if __name__ == "__main__":
    main()
