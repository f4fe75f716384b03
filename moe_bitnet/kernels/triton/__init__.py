"""Triton kernels for NVIDIA GPUs.

The package imports triton, so :mod:`moe_bitnet.kernels.backend_triton` alone loads it, and only where it can run::

    unpack.py           bytes of a tile to small integers, in registers
    block_sums.py       the loop over inputs: exact int32 sums of blocks of rows
    grouping.py         which expert's rows a program works on
    linear.py           rows by experts to matrices; split over inputs when rows are few
    expert_ffn.py       gate and up in one pass, with the activation
    quantize.py         rows to int8, with or without a norm before
    repack.py           base 3 to 2 bits, for products of many rows
    plan.py             sizes of tiles and number of programs, chosen on the host
    checks.py           what the operations accept
    launches.py         from tensors to launches
    operations.py       the operations with the signatures of the reference
"""
