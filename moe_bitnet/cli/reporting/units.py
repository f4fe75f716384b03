"""Numbers as a reader wants them: three significant digits and a unit.

Bytes are decimal (1 kB = 1,000 bytes), as everywhere in this package.
A number that is missing or not finite is written as a dash.
"""

import math

from moe_bitnet import units

DASH = "–"


def divide(value: float | None, baseline: float | None) -> float | None:
    """Divide, or return ``None`` where the ratio says nothing (missing, not finite, zero baseline)."""
    if value is None or baseline is None or baseline == 0:
        return None
    quotient = value / baseline
    return quotient if math.isfinite(quotient) else None


def format_number(value: float | None, digits: int = 3) -> str:
    """Write ``value`` with ``digits`` decimals, or a dash."""
    return DASH if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def format_significant(value: float) -> str:
    """Write ``value`` with two significant digits (``0.0021``, ``2.1e-05``), or a dash."""
    return f"{value:.2g}" if math.isfinite(value) else DASH


def format_count(count: int) -> str:
    """Write a count in full below ten million, else in millions or billions."""
    for size, unit in ((10**9, "G"), (10**6, "M")):
        if count >= 10 * size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,}"


def format_bytes(num_bytes: float) -> str:
    """Write bytes in decimal units, or a dash."""
    return units.format_bytes(num_bytes) if math.isfinite(num_bytes) else DASH


def format_ratio(ratio: float | None) -> str:
    """Write ``3.72×``, or a dash."""
    if ratio is None or not math.isfinite(ratio):
        return DASH
    if ratio == 0:
        return "0×"
    return f"{ratio:.3f}×" if abs(ratio) < 1.1 else f"{_three_digits(ratio)}×"


def format_change(ratio: float | None) -> str:
    """Write a ratio near 1 as a signed change: ``+2.1 %``."""
    if ratio is None or not math.isfinite(ratio):
        return DASH
    return f"{100 * (ratio - 1):+.1f} %".replace("-", "−")


def format_seconds(seconds: float) -> str:
    """Write a duration as ``12.3 s``, ``4 min 05 s`` or ``1 h 02 min``."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def _three_digits(value: float) -> str:
    """Write 1.23, 12.3 or 123."""
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
