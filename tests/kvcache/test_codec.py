import pytest
import torch

from kvcache import KVCacheConfig, codebook, codec
from kvcache.codec import decode_pages, encode_page
from kvcache.transform import rotate

# A step is computed and multiplied in float32: a few roundings of numbers up to 127 steps.
ROUNDING_STEPS = 127 * 4 * torch.finfo(torch.float32).eps
SMALLEST_FP16 = 2.0**-24


def page_format(bits, **change):
    sizes = {"num_kv_heads": 3, "page_size": 5, "head_dim": 64}
    return KVCacheConfig(num_layers=1, key_bits=bits, value_bits=bits, **{**sizes, **change}).page_format


def random_page(num_kv_heads=3, page_size=5, head_dim=64, seed=0):
    """Gaussian elements whose size changes by 2**12 between tokens, as float32 that float16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_kv_heads, page_size, head_dim, generator=generator)
    octave = torch.randint(-6, 7, (num_kv_heads, page_size, 1), generator=generator)
    return (x * 2.0**octave).half().float()


def round_trip(page_format, key, value):
    return decode_pages(page_format, encode_page(page_format, key, value).unsqueeze(0))


def signal_to_noise_db(x, approximation):
    noise = (approximation.double() - x.double()).square().sum()
    return float(10 * torch.log10(x.double().square().sum() / noise))


def from_hex(text):
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def test_fp16_page_is_exact():
    key, value = random_page(seed=0), random_page(seed=1)
    decoded_key, decoded_value = round_trip(page_format(16), key, value)
    assert torch.equal(decoded_key, key)
    assert torch.equal(decoded_value, value)


@pytest.mark.parametrize(("head_dim", "is_rotated"), [(64, True), (64, False), (7, False), (1, True)])
def test_int8_error_is_at_most_half_a_step(head_dim, is_rotated):
    x = random_page(head_dim=head_dim)
    decoded, _ = round_trip(page_format(8, head_dim=head_dim, is_rotated=is_rotated), x, x)
    x = rotate(x) if is_rotated else x
    # The step is max / 127, rounded up to float16: by one unit in the eleventh bit, or of the subnormal grid.
    step = x.abs().amax(dim=-1, keepdim=True).double() / 127 * (1 + 2**-10) + SMALLEST_FP16
    assert ((decoded.double() - x.double()).abs() <= step * (0.5 + ROUNDING_STEPS)).all()


@pytest.mark.parametrize(("head_dim", "is_rotated"), [(64, True), (64, False), (8, True), (2, False)])
def test_int4_error_is_at_most_that_of_the_covering_scale(head_dim, is_rotated):
    x = random_page(head_dim=head_dim)
    decoded, _ = round_trip(page_format(4, head_dim=head_dim, is_rotated=is_rotated), x, x)
    x = rotate(x) if is_rotated else x
    group_size = min(32, head_dim)
    groups = x.double().reshape(-1, group_size)
    error = (decoded.double().reshape(-1, group_size) - groups).square().mean(dim=-1).sqrt()
    # The search does no worse than the first scale that covers the group, one step of an octave/16 above it at most.
    half_gap = codebook.levels().diff().max() / 2
    scale = groups.abs().amax(dim=-1) / 127 * 2 ** (1 / 16)
    assert (error <= scale * (half_gap + ROUNDING_STEPS)).all()


def test_int4_keeps_20_db_on_gaussian_data():
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 8, 64, 64, generator=generator)
    decoded_key, decoded_value = round_trip(page_format(4, num_kv_heads=8, page_size=64), key, value)
    assert signal_to_noise_db(rotate(key), decoded_key) >= 20
    assert signal_to_noise_db(rotate(value), decoded_value) >= 20


def test_scale_search_never_does_worse_than_the_covering_scale(monkeypatch):
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    squared_errors = []
    for num_candidates in (6, 1):
        monkeypatch.setattr(codec, "NUM_SCALE_CANDIDATES", num_candidates)
        decoded, _ = round_trip(page_format(4), x, x)
        squared_errors.append((decoded.double() - rotate(x).double()).square().reshape(-1, 32).sum(dim=-1))
    # Neighbouring candidates may tie up to the rounding of a float32 sum of 32 squares.
    assert (squared_errors[0] <= squared_errors[1] * (1 + 32 * torch.finfo(torch.float32).eps)).all()
    assert squared_errors[0].sum() < 0.9 * squared_errors[1].sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_rotation_helps_outlier_channels(bits):
    x = random_page(page_size=64)
    x[:, :, 5] *= 50
    rotated, _ = round_trip(page_format(bits, page_size=64), x, x)
    plain, _ = round_trip(page_format(bits, page_size=64, is_rotated=False), x, x)
    noise_of_ordinary_channels = (plain - x).abs().mean()
    assert (rotated - rotate(x)).abs().mean() < noise_of_ordinary_channels


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("is_rotated", [True, False])
def test_zeros_stay_zero(bits, is_rotated):
    zeros = torch.zeros(3, 5, 64)
    decoded_key, decoded_value = round_trip(page_format(bits, is_rotated=is_rotated), zeros, zeros)
    assert torch.equal(decoded_key, zeros)
    assert torch.equal(decoded_value, zeros)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("magnitude", [65504.0, SMALLEST_FP16])
def test_extremes_of_fp16_stay_finite_and_near(bits, magnitude):
    x = torch.full((3, 5, 64), magnitude)
    x[:, ::2, 1::2] *= -1
    decoded, _ = round_trip(page_format(bits), x, x)
    # One channel may carry sqrt(64) times the magnitude. Its step is 2 % of that, or the grid of float16 scales.
    step = max(8 * magnitude / 127 * 2 ** (1 / 16), SMALLEST_FP16)
    half_gap = {8: 0.5, 4: float(codebook.levels().diff().max() / 2)}[bits]
    assert (decoded - rotate(x)).square().mean().sqrt() <= step * half_gap * (1 + ROUNDING_STEPS)


def test_int8_page_layout():
    # Two heads, one token, D = 2. Key rows have scales 0.5 (0x3800) and 1.0 (0x3C00), little endian.
    key = torch.tensor([[[63.5, -0.5]], [[-127.0, 3.0]]])
    content = encode_page(page_format(8, num_kv_heads=2, page_size=1, head_dim=2, is_rotated=False), key, -key)
    assert torch.equal(content, from_hex("0038 003c 7f ff 81 03   0038 003c 81 01 7f fd"))


def test_int4_page_layout():
    # One head, two tokens, D = 4, groups of 4. Base 1.0 (0x3C00); scale code 255 is 1.0 and 239 is one octave less.
    levels = codebook.levels()
    key = torch.stack((levels[[15, 0, 7, 8]], 0.5 * levels[[0, 1, 2, 3]])).reshape(1, 2, 4)
    value = levels[[0, 15, 9, 10, 4, 5, 0, 6]].reshape(1, 2, 4)
    content = encode_page(page_format(4, num_kv_heads=1, page_size=2, head_dim=4, is_rotated=False), key, value)
    assert torch.equal(content, from_hex("003c ff ef 0f 87 10 32   003c ff ff f0 a9 54 60"))


def test_odd_plane_ends_with_a_zero_byte():
    one = torch.ones(1, 1, 1)
    content = encode_page(page_format(8, num_kv_heads=1, page_size=1, head_dim=1), one, one)
    assert content.numel() == 2 * (2 + 1 + 1)
    assert content[3] == content[7] == 0


@pytest.mark.parametrize("key_bits", [16, 8, 4])
@pytest.mark.parametrize("value_bits", [16, 8, 4])
def test_run_of_pages_decodes_like_single_pages(key_bits, value_bits):
    config = KVCacheConfig(
        num_layers=1, num_kv_heads=3, head_dim=8, page_size=3, key_bits=key_bits, value_bits=value_bits
    )
    formats = config.page_format
    x = [random_page(page_size=3, head_dim=8, seed=seed) for seed in range(4)]
    pages = torch.stack([encode_page(formats, page, -page) for page in x])
    assert pages.shape == (4, config.page_bytes)
    key, value = decode_pages(formats, pages)
    for index in range(4):
        single_key, single_value = decode_pages(formats, pages[index : index + 1])
        assert torch.equal(key[:, 3 * index : 3 * index + 3], single_key)
        assert torch.equal(value[:, 3 * index : 3 * index + 3], single_value)
