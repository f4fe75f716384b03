import pytest

from benchmarks import rotation
from benchmarks.rotation import Rotation


@pytest.mark.parametrize(("num_bytes_each", "total_bytes", "num_copies"), [(10, 30, 3), (10, 31, 4), (10, 1, 2)])
def test_copies_fill_the_total(num_bytes_each, total_bytes, num_copies):
    assert len(Rotation(object, num_bytes_each, total_bytes)) == num_copies


def test_every_copy_has_its_turn_before_one_returns():
    copies = Rotation(object, 1, 3)
    first_round = [next(copies) for _ in range(3)]
    assert len(set(first_round)) == 3
    assert [next(copies) for _ in range(3)] == first_round


def test_the_default_total_exceeds_the_cache_many_times(monkeypatch):
    for cache_bytes, total_bytes in [(None, 512 * 2**20), (2**20, 512 * 2**20), (2**27, 2**31)]:
        monkeypatch.setattr(rotation, "last_level_cache_bytes", lambda size=cache_bytes: size)
        assert rotation.default_total_bytes() == total_bytes
