"""The C++ encoder writes the bytes of the reference, with every instruction set and any number of threads."""

from functools import cache

import pytest
import torch
from kernel_variants import Variant, computing_with, torch_threads
from page_factories import (
    WIDTHS,
    exact_page,
    layer_format,
    plain_layer_frame,
    random_tokens,
    skewed_layer_frame,
)

from kvcache.codec import encode_layer
from kvcache.kernels.cpp_encode import Encoder
from kvcache.page import PAGE_SIZE
from moe_bitnet.errors import BackendError, ShapeError
from moe_bitnet.kernels.backend_cpp import INSTRUCTION_SETS, load_kernel_library

FRAMES = {"plain": plain_layer_frame, "skewed": skewed_layer_frame}

SHAPES = ((1, 16), (3, 64), (1, 80), (1, 96), (1, 128))
"""KV heads and head_dim."""

TRELLIS_WIDTHS = ((4, 4), (2, 2))


@pytest.fixture(scope="module")
def encoder():
    try:
        return Encoder(load_kernel_library())
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, encoder):
    with computing_with(Variant("cpp", request.param)):
        yield request.param


def expected_bytes(layer, frame, page):
    """What the reference writes; its many small operations are quickest on one thread."""
    with torch_threads(1):
        return encode_layer(layer, frame, page)


def encode(encoder, layer, frame, page):
    packed = torch.full((layer.layer_bytes,), 0xA5, dtype=torch.uint8)
    encoder.encode_page(layer, frame, page, packed)
    return packed


@cache
def random_case(shape, widths, frame_kind):
    """A layer, its frame, a page of random tokens and what the reference makes of it."""
    layer = layer_format(*shape, *widths, is_calibrated=frame_kind == "skewed")
    frame = FRAMES[frame_kind](layer)
    page = exact_page(layer, *random_tokens(layer, PAGE_SIZE))
    return layer, frame, page, expected_bytes(layer, frame, page)


def single_outlier(shape, _):
    x = torch.full(shape, 0.01)
    x[5, :, 3] = -30000
    return x


EXTREMES = {
    "zeros": lambda shape, _: torch.zeros(shape),
    "huge": lambda shape, generator: 60000 * torch.randn(shape, generator=generator).sign(),
    "tiny": lambda shape, generator: 1e-6 * torch.randn(shape, generator=generator),
    "outlier": single_outlier,
    # sums of small integers lie halfway between levels: many paths of equal cost
    "ties": lambda shape, generator: torch.randint(-4, 5, shape, generator=generator).float(),
    "constant": lambda shape, _: torch.ones(shape),
}


@cache
def extreme_case(extreme, widths, frame_kind):
    layer = layer_format(1, 64, *widths, is_calibrated=frame_kind == "skewed")
    generator = torch.Generator().manual_seed(1)
    key, value = (EXTREMES[extreme]((PAGE_SIZE, 1, 64), generator) for _ in range(2))
    frame = FRAMES[frame_kind](layer)
    page = exact_page(layer, key, value)
    return layer, frame, page, expected_bytes(layer, frame, page)


@pytest.mark.parametrize("frame_kind", FRAMES)
@pytest.mark.parametrize("widths", WIDTHS)
def test_bytes_match_reference(encoder, instruction_set, widths, frame_kind):
    layer, frame, page, expected = random_case((3, 64), widths, frame_kind)
    assert torch.equal(encode(encoder, layer, frame, page), expected)


@pytest.mark.parametrize("frame_kind", FRAMES)
@pytest.mark.parametrize("widths", TRELLIS_WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_match_reference_for_every_head_dim(encoder, instruction_set, shape, widths, frame_kind):
    layer, frame, page, expected = random_case(shape, widths, frame_kind)
    assert torch.equal(encode(encoder, layer, frame, page), expected)


@pytest.mark.parametrize("frame_kind", FRAMES)
@pytest.mark.parametrize("widths", [*TRELLIS_WIDTHS, (8, 8)])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes_match_reference(encoder, instruction_set, extreme, widths, frame_kind):
    layer, frame, page, expected = extreme_case(extreme, widths, frame_kind)
    assert torch.equal(encode(encoder, layer, frame, page), expected)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_do_not_change_bytes(encoder, num_threads):
    layer, frame, page, expected = random_case((3, 64), (4, 4), "skewed")
    with torch_threads(num_threads):
        assert torch.equal(encode(encoder, layer, frame, page), expected)


def test_page_within_a_pool_leaves_its_neighbours_alone(encoder):
    layer, frame, page, expected = random_case((3, 64), (4, 2), "plain")
    pool = torch.full((3, layer.layer_bytes), 7, dtype=torch.uint8)
    encoder.encode_page(layer, frame, page, pool[1])
    assert torch.equal(pool[1], expected)
    assert (pool[::2] == 7).all()


def test_wrong_tensors_are_refused(encoder):
    layer, frame, page, expected = random_case((3, 64), (4, 4), "plain")
    for exact, packed in (
        (page[:-1], expected),
        (page, expected[:-1]),
        (page.view(torch.int8), expected),
        (page, torch.stack((expected, expected), dim=1)[:, 0]),
    ):
        with pytest.raises(ShapeError):
            encoder.encode_page(layer, frame, exact, packed)


def test_frame_of_another_format_is_refused(encoder):
    layer, _, page, expected = random_case((3, 64), (4, 4), "skewed")
    other = layer_format(3, 64, 4, 4)
    with pytest.raises(ShapeError, match="segment_weights"):
        encoder.encode_page(layer, plain_layer_frame(other), page, expected.clone())
