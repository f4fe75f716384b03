"""Benchmarks: one script a subject, each ``python -m benchmarks.<name> [--quick] [--json]``."""
