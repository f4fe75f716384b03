import torch

from kvcache import codebook


def test_levels_are_odd_symmetric_ascending_int8():
    levels = codebook.levels()
    assert levels.shape == (16,)
    assert torch.equal(levels, levels.round())
    assert torch.equal(levels, -levels.flip(0))
    assert (levels.diff() > 0).all()
    assert levels[-1] == 127


def test_levels_follow_the_cubic():
    assert codebook.levels()[8:].int().tolist() == [6, 19, 33, 48, 64, 82, 103, 127]


def test_boundaries_lie_halfway():
    levels, boundaries = codebook.levels(), codebook.level_boundaries()
    assert torch.equal(boundaries - levels[:-1], levels[1:] - boundaries)


def test_level_pairs_split_a_byte_low_nibble_first():
    assert torch.equal(codebook.level_pairs()[0x2F], codebook.levels()[[0xF, 0x2]])


def test_scale_steps_are_sixteen_an_octave():
    steps = codebook.scale_steps()
    assert steps.shape == (256,)
    assert steps[255] == 1
    assert torch.equal(steps[16:], 2 * steps[:-16])
    assert (steps.diff() > 0).all()
