import logging

import pytest
import torch
from factories import backends_with

from moe_bitnet.errors import BackendError
from moe_bitnet.kernels import backend_reference, registry, select
from moe_bitnet.kernels.library import load_library
from moe_bitnet.kernels.registry import Backend, Registry


def operation_of(name):
    return lambda: name


def make_registry():
    """``absent`` before ``fast`` (one operation, CPU only) before ``reference`` (both operations)."""
    return Registry(
        [
            Backend("absent", {}, ("cpu",), absent_because="its library was not built"),
            Backend("fast", {"multiply": operation_of("fast multiply")}, ("cpu",)),
            Backend(
                "reference",
                {"multiply": operation_of("plain multiply"), "add": operation_of("plain add")},
                ("cpu", "cuda"),
            ),
        ]
    )


def test_the_first_available_backend_with_the_operation_wins():
    backends = make_registry()
    assert backends.names() == ["absent", "fast", "reference"]
    assert backends.select("multiply")() == "fast multiply"
    assert backends.select("add")() == "plain add"
    assert backends.select("multiply", "cuda")() == "plain multiply"


def test_a_named_backend_is_taken():
    assert make_registry().select("multiply", backend="reference")() == "plain multiply"


def test_the_environment_pins_a_backend(monkeypatch):
    monkeypatch.setenv("MOE_BITNET_BACKEND", "reference")
    assert make_registry().select("multiply")() == "plain multiply"
    assert make_registry().select("multiply", backend="fast")() == "fast multiply", "an argument is stronger"


def test_a_pinned_backend_without_the_operation_is_passed_over_loudly(monkeypatch, caplog):
    monkeypatch.setenv("MOE_BITNET_BACKEND", "fast")
    assert make_registry().select("add")() == "plain add"
    assert any("fast has no add for cpu" in message for message in caplog.messages)


def test_an_empty_variable_pins_nothing(monkeypatch):
    monkeypatch.setenv("MOE_BITNET_BACKEND", "")
    assert make_registry().select("multiply")() == "fast multiply"


def test_an_unknown_name_is_an_error_that_lists_the_allowed(monkeypatch):
    with pytest.raises(BackendError, match=r"'fats' is unknown.*absent, fast, reference"):
        make_registry().select("multiply", backend="fats")
    monkeypatch.setenv("MOE_BITNET_BACKEND", "fats")
    with pytest.raises(BackendError, match="'fats' is unknown"):
        make_registry().select("multiply")


def test_an_absent_backend_asked_for_by_name_is_an_error_with_its_reason(monkeypatch):
    with pytest.raises(BackendError, match="'absent' is not available: its library was not built"):
        make_registry().select("multiply", backend="absent")
    monkeypatch.setenv("MOE_BITNET_BACKEND", "absent")
    with pytest.raises(BackendError, match="its library was not built"):
        make_registry().select("multiply")


def test_a_missing_operation_or_device_is_an_error():
    with pytest.raises(BackendError, match="'fast' has no add for cpu"):
        make_registry().select("add", backend="fast")
    with pytest.raises(BackendError, match="'fast' has no multiply for cuda"):
        make_registry().select("multiply", "cuda", backend="fast")
    with pytest.raises(BackendError, match="no backend has divide for cpu"):
        make_registry().select("divide")
    with pytest.raises(BackendError, match="no backend has add for mps"):
        make_registry().select("add", "mps")


def test_an_absent_backend_is_announced_once_with_its_reason(caplog):
    backends = make_registry()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            backends.select("multiply")
            backends.select("add")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "absent is not available (its library was not built)" in record.getMessage()


def test_nothing_is_announced_if_the_preferred_backend_is_there(caplog):
    backends = Registry(make_registry().backends[1:])
    backends.select("multiply")
    backends.select("add")
    assert not caplog.records


def test_the_cpp_backend_is_built():
    # The install builds it, so its absence is a failure and not a skip.
    assert registry().backend("cpp").absent_because is None
    assert "cpp" in backends_with("quantize_activation")


def test_the_process_prefers_cpp_and_falls_back_to_the_reference():
    names = registry().names()
    assert names[-1] == "reference"
    assert names.index("cpp") < names.index("reference")
    assert select("quantize_activation") == registry().backend("cpp").operations["quantize_activation"]


def test_every_backend_implements_operations_of_the_reference_only():
    for backend in registry().backends:
        assert set(backend.operations) <= set(backend_reference.OPERATIONS)


def test_a_library_that_was_not_built_is_an_error_that_says_what_to_do():
    with pytest.raises(BackendError, match=r"libnothing\.so was not built.*pip install"):
        load_library("moe_bitnet.kernels", "libnothing.so", 1)


def test_a_library_of_another_version_is_refused():
    with pytest.raises(BackendError, match=r"interface version \d+, this code needs 999.*pip install"):
        load_library("moe_bitnet.kernels", "libternary.so", 999)


def test_a_folder_that_is_named_takes_the_place_of_the_installed_library(monkeypatch, tmp_path):
    # a sanitized build must not be passed over in silence for the installed one
    monkeypatch.setenv("MOE_BITNET_LIBRARY_FOLDER", str(tmp_path))
    with pytest.raises(BackendError, match=r"libternary\.so is not in .*MOE_BITNET_LIBRARY_FOLDER.*unset it"):
        load_library("moe_bitnet.kernels", "libternary.so", 1)
    (tmp_path / "libternary.so").write_bytes(b"noise")
    with pytest.raises(BackendError, match=rf"{tmp_path}/libternary\.so cannot be loaded"):
        load_library("moe_bitnet.kernels", "libternary.so", 1)


def test_a_file_that_is_no_library_is_refused(monkeypatch, tmp_path):
    (tmp_path / "libnoise.so").write_bytes(torch.zeros(100, dtype=torch.uint8).numpy().tobytes())
    monkeypatch.setattr("moe_bitnet.kernels.__path__", [str(tmp_path)])
    with pytest.raises(BackendError, match=r"libnoise\.so cannot be loaded.*pip install"):
        load_library("moe_bitnet.kernels", "libnoise.so", 1)
