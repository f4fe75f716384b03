import pytest
import torch

from kvcache.transform import rotate, unrotate

POWERS_OF_TWO = [1, 2, 8, 64, 256]
SIGNS_OF_16_CHANNELS = [-1, 1, 1, 1, -1, -1, 1, 1, 1, 1, 1, -1, 1, 1, 1, -1]
FLOAT32_EPS = torch.finfo(torch.float32).eps


def num_roundings(head_dim):
    """One rounding per round of sums, one for the factor 1 / sqrt(D), and one for that factor itself."""
    return head_dim.bit_length() + 2


@pytest.mark.parametrize("head_dim", POWERS_OF_TWO)
def test_rotation_is_orthonormal(head_dim):
    matrix = rotate(torch.eye(head_dim)).double()
    error = (matrix @ matrix.T - torch.eye(head_dim, dtype=torch.float64)).abs().max()
    assert error <= 2 * num_roundings(head_dim) * FLOAT32_EPS


@pytest.mark.parametrize("head_dim", POWERS_OF_TWO)
def test_unrotate_inverts_rotate(head_dim):
    x = torch.randn(3, 7, head_dim, generator=torch.Generator().manual_seed(0))
    error = torch.linalg.vector_norm(unrotate(rotate(x)).double() - x.double(), dim=-1)
    bound = 2 * num_roundings(head_dim) * FLOAT32_EPS * torch.linalg.vector_norm(x.double(), dim=-1)
    assert (error <= bound).all()


@pytest.mark.parametrize("head_dim", POWERS_OF_TWO)
def test_every_entry_has_the_same_size(head_dim):
    assert torch.equal(rotate(torch.eye(head_dim)).abs(), torch.full((head_dim, head_dim), head_dim**-0.5))


def test_rotation_matches_hadamard_matrix_with_signs():
    signs = rotate(torch.eye(4))[:, 0] * 2  # the first column of H is all ones
    hadamard = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    assert torch.equal(rotate(torch.eye(4)), signs[:, None] * hadamard / 2)


def test_signs_are_the_same_for_ever():
    first_column = rotate(torch.eye(16))[:, 0] * 4
    assert first_column.int().tolist() == SIGNS_OF_16_CHANNELS


def test_constant_vector_is_spread():
    rotated = rotate(torch.ones(64))
    assert rotated.abs().max() < 0.5 * torch.linalg.vector_norm(rotated)
