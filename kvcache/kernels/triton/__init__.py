"""Triton kernels for NVIDIA GPUs: attention over pages, and their encoder.

The package imports triton, so :mod:`kvcache.kernels.backend_triton` alone loads it, and only where it can run::

    layout.py           a page's format as numbers that a kernel is compiled for
    levels.py           words of a page to int8 levels, in registers
    rounding.py         to the nearest even integer; float32 as two float16
    rows.py             which sequence's rows and pages a program works on
    softmax.py          running softmax of a tile of rows
    exact.py            float16 pages and new tokens
    packed.py           packed pages
    queries.py          queries to int8 digits in the frame of the keys
    merge.py            partial results to outputs
    plan.py             sizes of tiles and number of programs, chosen on the host
    attention.py        from tensors to the launches of attention
    frame_map.py        float16 planes to numbers in their frame
    viterbi.py          the best row of trellis codes
    trials.py           which scale every token takes
    writer.py           codes of a plane with the chosen scales
    encode.py           from a page to the launches of its encoder
    tables.py           levels and scales on the device
    operations.py       the operations with the signatures of the reference, and their checks
"""
