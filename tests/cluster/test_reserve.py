import pytest

from cluster.reserve import INTERPRETER_BYTES, reserve_bytes
from moe_bitnet.errors import ConfigError


def test_the_reserve_is_interpreter_workspace_and_margin():
    assert reserve_bytes(4096, 14_336, 512, margin_bytes=7) == INTERPRETER_BYTES + 512 * (4096 + 14_336) * 4 + 7
    assert reserve_bytes(margin_bytes=0, interpreter_bytes=0) == 0


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "max_tokens", "margin_bytes"])
@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_negative_sizes_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        reserve_bytes(**{name: value})
