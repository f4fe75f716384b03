"""From tensors to launches: outputs are allocated, products planned, kernels started on the tensors' device.

Arguments have passed :mod:`moe_bitnet.kernels.triton.checks`. Nothing here waits for the GPU.
"""

import torch
from torch import Tensor

from moe_bitnet.kernels.triton.expert_ffn import activate_kernel, gate_up_kernel
from moe_bitnet.kernels.triton.linear import linear_kernel, rescale_kernel
from moe_bitnet.kernels.triton.plan import Plan, make_plan
from moe_bitnet.kernels.triton.quantize import quantize_kernel, row_sums_kernel
from moe_bitnet.kernels.triton.repack import GROUPS_PER_PROGRAM, repack_kernel
from moe_bitnet.tiles import TiledTernary, block_bytes, num_row_blocks

INTERPRETED_MULTIPROCESSORS = 4
"""Plans for tensors on the CPU, which Triton's interpreter runs, are those of a tiny GPU."""

_MAX_ROW_BLOCK = 2048
_FEATURES_PER_PROGRAM = 1024


def gate_up(
    rows: Tensor,
    scales: Tensor,
    gate: TiledTernary,
    up: TiledTernary,
    is_squared_relu: bool,
    offsets: Tensor,
    plan: Plan | None = None,
) -> Tensor:
    """Compute ``activation(gate(x)) · up(x)``, each row with its expert's matrices.

    Args:
        rows: int8 ``[num_rows, H]``, sorted by expert, contiguous.
        scales: float32 ``[num_rows, 1]``.
        gate: ``[num_experts, F, H]``.
        up: the same, in the same layout.
        is_squared_relu: the activation; otherwise SwiGLU.
        offsets: int64 ``[num_experts + 1]``.
        plan: how to cut the product; chosen by size unless given.
    Returns:
        float32 ``[num_rows, F]``.
    """
    num_rows, num_experts = rows.shape[0], offsets.numel() - 1
    inner = torch.empty((num_rows, gate.out_features), dtype=torch.float32, device=rows.device)
    if num_rows == 0:
        return inner
    plan = plan or _plan(rows, gate, num_experts, is_pair=True)
    gate, up = _in_layout(gate, plan), _in_layout(up, plan)
    is_split = plan.num_splits > 1
    partial = _partial(plan, inner, num_matrices=2)
    sums = inner if plan.tile.sums_rows else _row_sums(rows)
    with torch.cuda.device_of(rows):
        gate_up_kernel[plan.grid](
            rows,
            scales,
            sums,
            offsets,
            gate.tiles,
            up.tiles,
            gate.weight_scale,
            up.weight_scale,
            inner,
            partial,
            num_rows,
            num_experts,
            gate.in_features,
            gate.out_features,
            num_row_blocks(gate.out_features),
            block_bytes(gate.in_features, gate.layout),
            plan.num_steps,
            plan.steps_per_split,
            plan.num_splits,
            IS_BASE3=gate.layout == "base3",
            IS_SPLIT=is_split,
            SUMS_ROWS=plan.tile.sums_rows,
            ROW_BLOCKS=plan.tile.row_blocks,
            BLOCK_TOKENS=plan.tile.block_tokens,
            MAX_EXPERTS=_power_of_two(num_experts),
            IS_SQUARED_RELU=is_squared_relu,
            USE_PTX=_uses_ptx(rows),
            num_warps=plan.tile.num_warps,
            num_stages=plan.tile.num_stages,
            enable_fp_fusion=False,
        )
        if is_split:
            activate_kernel[_feature_grid(inner)](
                partial,
                scales,
                gate.weight_scale,
                up.weight_scale,
                offsets,
                inner,
                plan.num_splits,
                num_rows,
                num_experts,
                gate.out_features,
                IS_SQUARED_RELU=is_squared_relu,
                MAX_EXPERTS=_power_of_two(num_experts),
                BLOCK_FEATURES=_FEATURES_PER_PROGRAM,
                enable_fp_fusion=False,
            )
    return inner


def launch_linear(
    rows: Tensor, scales: Tensor, weight: TiledTernary, offsets: Tensor | None, sums: Tensor | None, plan: Plan | None
) -> Tensor:
    """Multiply int8 rows by one matrix, or by that of each row's expert.

    Args:
        rows: int8 ``[num_rows, in_features]``, contiguous.
        scales: float32 ``[num_rows, 1]``.
        weight: one matrix, or one an expert.
        offsets: int64 ``[num_experts + 1]``, or ``None`` for one matrix.
        sums: int32 ``[num_rows]``, the sums of the rows, if they are known.
        plan: how to cut the product; chosen by size unless given.
    Returns:
        float32 ``[num_rows, out_features]``.
    """
    num_rows, num_experts = rows.shape[0], 1 if offsets is None else offsets.numel() - 1
    output = torch.empty((num_rows, weight.out_features), dtype=torch.float32, device=rows.device)
    if num_rows == 0:
        return output
    plan = plan or _plan(rows, weight, num_experts)
    weight = _in_layout(weight, plan)
    is_split, is_grouped = plan.num_splits > 1, offsets is not None
    partial = _partial(plan, output, num_matrices=1)
    if sums is None:
        sums = output if plan.tile.sums_rows else _row_sums(rows)
    offsets_or_unused = scales if offsets is None else offsets
    with torch.cuda.device_of(rows):
        linear_kernel[plan.grid](
            rows,
            scales,
            sums,
            offsets_or_unused,
            weight.tiles,
            weight.weight_scale,
            output,
            partial,
            num_rows,
            num_experts,
            weight.in_features,
            weight.out_features,
            num_row_blocks(weight.out_features),
            block_bytes(weight.in_features, weight.layout),
            plan.num_steps,
            plan.steps_per_split,
            IS_BASE3=weight.layout == "base3",
            IS_GROUPED=is_grouped,
            IS_SPLIT=is_split,
            SUMS_ROWS=plan.tile.sums_rows,
            ROW_BLOCKS=plan.tile.row_blocks,
            BLOCK_TOKENS=plan.tile.block_tokens,
            MAX_EXPERTS=_power_of_two(num_experts),
            USE_PTX=_uses_ptx(rows),
            num_warps=plan.tile.num_warps,
            num_stages=plan.tile.num_stages,
            enable_fp_fusion=False,
        )
        if is_split:
            rescale_kernel[_feature_grid(output)](
                partial,
                scales,
                weight.weight_scale,
                offsets_or_unused,
                output,
                plan.num_splits,
                num_rows,
                num_experts,
                weight.out_features,
                IS_GROUPED=is_grouped,
                MAX_EXPERTS=_power_of_two(num_experts),
                BLOCK_FEATURES=_FEATURES_PER_PROGRAM,
                enable_fp_fusion=False,
            )
    return output


def launch_quantize(
    rows: Tensor, gain: Tensor | None, eps: float, offsets: Tensor | None, *, sums_rows: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize rows, after a norm if there is a gain.

    Args:
        rows: float ``[..., features]``, contiguous.
        gain: float32 ``[features]``, or ``[num_experts, features]`` with offsets, or ``None``.
        eps: added to the mean square.
        offsets: int64 ``[num_experts + 1]``, or ``None``.
        sums_rows: return the sums of the int8 rows, too.
    Returns:
        int8 rows, float32 ``[..., 1]``, and int32 ``[num_rows]`` (without meaning unless asked for).
    """
    num_features = rows.shape[-1]
    x_q = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    activation_scale = torch.empty((*rows.shape[:-1], 1), dtype=torch.float32, device=rows.device)
    sums = torch.empty(activation_scale.numel() if sums_rows else 1, dtype=torch.int32, device=rows.device)
    num_rows, num_experts = activation_scale.numel(), 1 if offsets is None else offsets.numel() - 1
    if num_rows == 0:
        return x_q, activation_scale, sums
    with torch.cuda.device_of(rows):
        quantize_kernel[(num_rows,)](
            rows,
            activation_scale if gain is None else gain,
            activation_scale if offsets is None else offsets,
            x_q,
            activation_scale,
            sums,
            num_experts,
            num_features,
            eps,
            HAS_NORM=gain is not None,
            IS_GROUPED=offsets is not None,
            SUMS_ROWS=sums_rows,
            MAX_EXPERTS=_power_of_two(num_experts),
            BLOCK=_row_block(num_features),
            num_warps=8 if num_features > 1024 else 4,
            enable_fp_fusion=False,
        )
    return x_q, activation_scale, sums


def _row_sums(rows: Tensor) -> Tensor:
    sums = torch.empty(rows.shape[0], dtype=torch.int32, device=rows.device)
    with torch.cuda.device_of(rows):
        row_sums_kernel[(rows.shape[0],)](
            rows, sums, rows.shape[-1], BLOCK=_row_block(rows.shape[-1]), enable_fp_fusion=False
        )
    return sums


def _plan(rows: Tensor, weight: TiledTernary, num_experts: int, is_pair: bool = False) -> Plan:
    num_multiprocessors, capability_major = INTERPRETED_MULTIPROCESSORS, 9
    if rows.is_cuda:
        device = torch.cuda.get_device_properties(rows.device)
        num_multiprocessors, capability_major = device.multi_processor_count, device.major
    return make_plan(
        num_rows=rows.shape[0],
        num_experts=num_experts,
        out_features=weight.out_features,
        in_features=weight.in_features,
        layout=weight.layout,
        num_multiprocessors=num_multiprocessors,
        capability_major=capability_major,
        is_pair=is_pair,
    )


def _in_layout(weight: TiledTernary, plan: Plan) -> TiledTernary:
    """Return the weight in the layout that the plan multiplies; repacks base 3 for many rows."""
    if weight.layout == plan.layout:
        return weight
    assert plan.layout == "2bit", "base 3 is repacked to 2 bits, never the other way"
    num_blocks = weight.weight_scale.numel() * num_row_blocks(weight.out_features)
    base3_bytes, two_bit_bytes = (block_bytes(weight.in_features, layout) for layout in (weight.layout, plan.layout))
    tiles = torch.empty((*weight.tiles.shape[:-1], two_bit_bytes), dtype=torch.uint8, device=weight.tiles.device)
    with torch.cuda.device_of(tiles):
        repack_kernel[(num_blocks, -(-base3_bytes // (256 * GROUPS_PER_PROGRAM)))](
            weight.tiles,
            tiles,
            base3_bytes,
            two_bit_bytes,
            GROUPS=GROUPS_PER_PROGRAM,
            USE_PTX=_uses_ptx(tiles),
            enable_fp_fusion=False,
        )
    return TiledTernary(tiles, weight.weight_scale, weight.out_features, weight.in_features, plan.layout)


def _partial(plan: Plan, output: Tensor, num_matrices: int) -> Tensor:
    """Memory for the shares of a split product; without splits any tensor will do."""
    if plan.num_splits == 1:
        return output
    return torch.empty((num_matrices, plan.num_splits, *output.shape), dtype=torch.int32, device=output.device)


def _feature_grid(output: Tensor) -> tuple[int, int]:
    return output.shape[0], -(-output.shape[1] // _FEATURES_PER_PROGRAM)


def _row_block(num_features: int) -> int:
    return min(_MAX_ROW_BLOCK, max(128, _power_of_two(num_features)))


def _power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least ``count``, and at least 2."""
    return 1 << max(1, (count - 1).bit_length())


def _uses_ptx(rows: Tensor) -> bool:
    return rows.is_cuda and torch.version.hip is None
