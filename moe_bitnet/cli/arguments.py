"""Types of options: each turns text into a checked value, or says what is allowed."""

import argparse
import math

LARGEST_SEED = 2**63 - 1
MAX_CONTEXT_LEN = 2**40


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


def context_len(text: str) -> int:
    """Read a number of tokens; ``k`` is 1024 and ``m`` is 1024², as context lengths are named."""
    factor = {"k": 2**10, "m": 2**20}.get(text[-1:].lower(), 1)
    digits = text if factor == 1 else text[:-1]
    if not digits.isdecimal() or not 1 <= int(digits) * factor <= MAX_CONTEXT_LEN:
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens, such as 8192 or 32k")
    return int(digits) * factor
