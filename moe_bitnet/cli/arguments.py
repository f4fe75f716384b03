"""Types of options: each turns text into a checked value, or says what is allowed."""

import argparse
import math

LARGEST_SEED = 2**63 - 1


def seed(text: str) -> int:
    """Read a seed, 0 to 2**63 - 1."""
    value = int(text)
    if not 0 <= value <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2**63 - 1")
    return value


def megabytes(text: str) -> int:
    """Read a positive number of MB (1e6 bytes); returns bytes."""
    value = float(text)
    if not math.isfinite(value) or value * 1e6 < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of MB")
    return int(value * 1e6)
