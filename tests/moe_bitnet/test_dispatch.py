import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bitnet.dispatch import combine, sort_by_expert

ALIGNMENTS = [1, 4, 32]


def random_indices(num_tokens, num_experts, top_k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=-1)[:, :top_k]


@settings(deadline=None, max_examples=60)
@given(num_tokens=st.integers(1, 33), num_experts=st.integers(1, 7), seed=st.integers(0, 2**31), data=st.data())
@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_every_slot_lies_in_the_rows_of_its_expert_in_token_order(alignment, num_tokens, num_experts, seed, data):
    top_k = data.draw(st.integers(1, num_experts))
    indices = random_indices(num_tokens, num_experts, top_k, seed)
    dispatch = sort_by_expert(indices, num_experts, alignment)
    offsets = dispatch.expert_offsets.tolist()
    assert len(offsets) == num_experts + 1
    assert offsets[0] == 0
    assert offsets[-1] == len(dispatch.sorted_token_indices)
    assert len(dispatch.slot_positions.unique()) == num_tokens * top_k
    for expert in range(num_experts):
        # by definition: the tokens that chose the expert, from first to last, from the expert's first row on
        tokens = [token for token in range(num_tokens) if expert in indices[token].tolist()]
        start = offsets[expert]
        assert start % alignment == 0
        assert offsets[expert + 1] - start >= len(tokens)
        assert dispatch.sorted_token_indices[start : start + len(tokens)].tolist() == tokens
        for rank, token in enumerate(tokens):
            slot = token * top_k + indices[token].tolist().index(expert)
            assert dispatch.slot_positions[slot] == start + rank


def test_without_alignment_no_row_is_added():
    dispatch = sort_by_expert(random_indices(33, 5, 2), 5)
    assert len(dispatch.sorted_token_indices) == 66
    assert torch.equal(dispatch.sorted_token_indices.bincount(), torch.full((33,), 2))


@pytest.mark.parametrize("alignment", [4, 32])
def test_number_of_aligned_rows_does_not_depend_on_the_routing(alignment):
    lengths = {
        len(sort_by_expert(indices, 5, alignment).sorted_token_indices)
        for indices in [torch.zeros(33, 1, dtype=torch.int64), torch.full((33, 1), 4)]
        + [random_indices(33, 5, 1, seed) for seed in range(20)]
    }
    assert len(lengths) == 1
    assert lengths.pop() <= -(-33 // alignment) * alignment + 5 * alignment


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 1), (7, 7), (33, 5)])
def test_combine_inverts_the_sort(alignment, num_tokens, num_experts):
    x = torch.randn(num_tokens, 3)
    dispatch = sort_by_expert(random_indices(num_tokens, num_experts, 1), num_experts, alignment)
    outputs = x[dispatch.sorted_token_indices]
    assert torch.equal(combine(outputs, dispatch.slot_positions, torch.ones(num_tokens, 1)), x)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_rows_that_alignment_added_are_never_read(alignment):
    indices, x, weights = random_indices(33, 5, 2), torch.randn(33, 3), torch.rand(33, 2)
    dispatch = sort_by_expert(indices, 5, alignment)
    outputs = x[dispatch.sorted_token_indices]
    is_padding = torch.ones(len(outputs), dtype=torch.bool)
    is_padding[dispatch.slot_positions] = False
    assert int(is_padding.sum()) == len(outputs) - 66
    assert bool(is_padding.any()) == (alignment > 1)
    assert not dispatch.sorted_token_indices[is_padding].any(), "padding is a copy of token 0"
    outputs[is_padding] = float("nan")
    outputs.requires_grad_()
    result = combine(outputs, dispatch.slot_positions, weights)
    assert bool(result.isfinite().all())
    result.sum().backward()
    assert not outputs.grad[is_padding].any()


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_combine_is_the_weighted_sum_over_choices(alignment):
    indices, weights = random_indices(33, 5, 3), torch.rand(33, 3)
    dispatch = sort_by_expert(indices, 5, alignment)
    outputs = torch.randn(len(dispatch.sorted_token_indices), 7)
    rows = outputs[dispatch.slot_positions].view(33, 3, 7)
    # one expert after the other in the order of choices: these very bits are promised
    expected = rows[:, 0] * weights[:, :1] + rows[:, 1] * weights[:, 1:2] + rows[:, 2] * weights[:, 2:]
    assert torch.equal(combine(outputs, dispatch.slot_positions, weights), expected)


def test_combined_bits_do_not_depend_on_alignment():
    indices, weights, x = random_indices(33, 5, 2), torch.rand(33, 2), torch.randn(33, 7)
    results = []
    for alignment in ALIGNMENTS:
        dispatch = sort_by_expert(indices, 5, alignment)
        expert_of_row = torch.searchsorted(
            dispatch.expert_offsets[1:], torch.arange(len(dispatch.sorted_token_indices)), right=True
        )
        outputs = x[dispatch.sorted_token_indices] * (expert_of_row + 1).unsqueeze(-1)
        results.append(combine(outputs, dispatch.slot_positions, weights))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_tokens_give_no_rows():
    dispatch = sort_by_expert(torch.empty(0, 2, dtype=torch.int64), 5)
    assert dispatch.expert_offsets.tolist() == [0] * 6
    assert combine(torch.empty(0, 3), dispatch.slot_positions, torch.empty(0, 2)).shape[0] == 0
