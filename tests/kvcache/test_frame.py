import pytest
import torch

from kvcache.frame import flat_orthonormal, plain_frame, unbiased


@pytest.mark.parametrize("size", [1, 8, 16, 40, 64, 80, 96, 128])
def test_matrix_is_orthonormal_and_flat(size):
    matrix = flat_orthonormal(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    assert matrix.abs().max() <= 2**0.5 / size**0.5 + 1e-12


def test_signs_are_part_of_the_format():
    assert (flat_orthonormal(8)[:, 0].sign()).tolist() == [-1, 1, 1, 1, -1, -1, 1, 1]


@pytest.mark.parametrize("head_dim", [64, 80])
def test_decode_undoes_encode(head_dim):
    x = torch.randn(3, 5, head_dim, generator=torch.Generator().manual_seed(0))
    frame = plain_frame(3, head_dim)
    torch.testing.assert_close(frame.decode(frame.encode(x)), x)


def test_scores_and_sums_need_no_decoded_vector():
    """q' . y + q . mean is the score, (sum p y) @ decode + (sum p) mean the weighted sum, for any map and mean."""
    generator = torch.Generator().manual_seed(0)
    frame = plain_frame(1, 64)
    mean = torch.randn(1, 64, generator=generator)
    frame = type(frame)(mean, frame.encode_matrix * 3, frame.decode_matrix / 3, frame.segment_weights)
    x, query, weights = (torch.randn(n, 64, generator=generator) for n in (10, 2, 1))
    y = frame.encode(x[None])[0]
    scores = query @ frame.decode_matrix[0].T @ y.T + query @ mean.T
    torch.testing.assert_close(scores, query @ x.T, rtol=1e-4, atol=1e-4)
    weights = weights[:, :10].softmax(dim=1) * 0.7
    mixed = weights @ y @ frame.decode_matrix[0] + weights.sum() * mean
    torch.testing.assert_close(mixed, weights @ x, rtol=1e-4, atol=1e-4)


def test_channels_that_come_back_short_are_lengthened():
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    kept_share = torch.linspace(0.5, 1, 64, dtype=torch.float64)
    plain = plain_frame(2, 64)
    torch.testing.assert_close(unbiased(plain, kept_share).decode(plain.encode(x) * kept_share.float()), x)
