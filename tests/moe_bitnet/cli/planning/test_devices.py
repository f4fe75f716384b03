import pytest

from cluster.topology import Device, Topology, logical_devices
from moe_bitnet.cli.planning.device_catalogue import DEVICE_CATALOGUE, catalogue_topology
from moe_bitnet.cli.planning.device_pool import DevicePool, describe_memory, larger_topology
from moe_bitnet.errors import ConfigError

GB = 10**9


@pytest.mark.parametrize("name", DEVICE_CATALOGUE)
def test_a_catalogue_device_has_the_memory_in_its_name(name):
    (device,) = catalogue_topology(name, 1).devices
    assert device.name == f"{name}-0"
    assert device.kind == "cuda"
    assert device.memory_bytes == int(name.rpartition("-")[2].removesuffix("gb")) * GB
    assert device.reserved_bytes == (5 * GB if device.memory_bytes >= 80 * GB else 4 * GB)


def test_a_reserve_of_ones_own_and_another_case_are_taken():
    assert catalogue_topology("RTX-4090-24GB", 2, reserved_bytes=GB).devices[1].usable_bytes == 23 * GB
    with pytest.raises(ConfigError, match=r"'h100' is not in the catalogue, which has t4-16gb.*h200-141gb"):
        catalogue_topology("h100", 1)


def test_a_limit_cuts_equal_devices_and_only_counts_others():
    open_pool = DevicePool("p", logical_devices(9, 5), is_open=True)
    assert open_pool.limited(None) is open_pool
    assert open_pool.limited(3) == DevicePool("p", logical_devices(3, 5))
    fixed = DevicePool("f.json", Topology((Device("a", 1), Device("b", 2))))
    assert fixed.limited(1) == DevicePool("f.json", fixed.topology, max_devices=1)
    with pytest.raises(ConfigError, match=r"--devices is 3, but f.json has 2 \(a, b\). Give 1 to 2"):
        fixed.limited(3)
    with pytest.raises(ConfigError, match="--devices is 0, but p has 9"):
        open_pool.limited(0)


def test_only_equal_devices_can_be_thought_more_of():
    assert larger_topology(logical_devices(2, 5)).devices[4000].usable_bytes == 5
    assert larger_topology(Topology((Device("a", 1), Device("b", 2)))) is None


def test_memory_is_told_with_what_is_usable():
    assert describe_memory(catalogue_topology("l4-24gb", 3)) == "24 GB, 20 GB usable"
    assert describe_memory(Topology((Device("a", GB), Device("b", 2 * GB)))) == "1 GB to 2 GB usable"
