import os
import subprocess
import sys
from pathlib import Path

from cluster import machine
from cluster.machine import boot_id, machine_id


def test_processes_of_one_machine_agree():
    command = "from cluster.machine import machine_id; print(machine_id())"
    root = Path(machine.__file__).parents[1]
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=root)
    assert other.stdout.strip() == machine_id()


def test_the_user_and_the_namespaces_are_part_of_it(monkeypatch):
    here = machine_id()
    assert os.readlink("/proc/self/ns/net") in here
    assert os.readlink("/proc/self/ns/mnt") in here
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert machine_id() != here
    assert ":12345" in machine_id()


def test_without_a_boot_id_it_is_the_name_of_the_node(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_BOOT_ID", tmp_path / "none")
    assert boot_id() == os.uname().nodename
    assert machine_id().startswith(f"{os.uname().nodename}:{os.getuid()}")
