"""Which experts tokens visited: traces, kept from a run or made up, for planning and benchmarks.

Read in this order: ``trace`` (what is kept), ``trace_file`` (on disk), ``recorder`` (from a run),
``synthetic`` (made up).
"""
