import json
import shutil

import numpy as np
import pytest
import torch
from host_factories import KINDS, experts_of, model_of, store_of

from cluster.expert_source import CheckpointSource
from cluster.expert_store import slice_experts
from moe_bitnet.checkpoint.native import CONFIG_NAME, TENSORS_NAME, save_model
from moe_bitnet.errors import CheckpointError, ShapeError

SUBSETS = ([0], [4], [1, 3], [0, 1, 2], [0, 2, 3], [0, 1, 2, 3, 4], [])


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    save_model(model_of("2bit"), folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_a_checkpoint_are_those_of_the_model(kind, tmp_path):
    model = model_of(kind)
    save_model(model, tmp_path / "model")
    source = CheckpointSource.of(tmp_path / "model")
    for layer_index in range(model.config.num_layers):
        for expert_ids in SUBSETS:
            read, expected = (
                source.slice(layer_index, expert_ids),
                slice_experts(experts_of(model, layer_index), layer_index, expert_ids),
            )
            assert (read.layer_index, read.expert_ids, read.num_bytes) == (layer_index, expert_ids, expected.num_bytes)
            assert read.tensors.keys() == expected.tensors.keys()
            for name, array in read.tensors.items():
                assert array.dtype == expected.tensors[name].dtype
                assert np.array_equal(array, expected.tensors[name]), (name, expert_ids)


def test_bfloat16_weights_travel_as_float32_of_the_same_value(tmp_path):
    model = model_of("float32")
    save_model(model, tmp_path / "model", torch.bfloat16)
    experts = experts_of(model)
    for name in ("gate_weight", "up_weight", "down_weight"):
        parameter = experts.get_parameter(name)
        parameter.data = parameter.data.bfloat16()
    read = CheckpointSource.of(tmp_path / "model").slice(0, [1, 3])
    sliced = slice_experts(experts, 0, [1, 3])
    for name in ("up_weight", "norm_weight"):
        assert read.tensors[name].dtype == sliced.tensors[name].dtype == np.float32
        expected = experts.get_parameter(name).detach()[[1, 3]].float().numpy()
        assert np.array_equal(read.tensors[name], expected)
        assert np.array_equal(sliced.tensors[name], expected)
    store = store_of(model)
    assert store.load(read) == read.num_bytes


def test_the_path_means_the_same_in_another_folder(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    source = CheckpointSource.of("model")
    monkeypatch.chdir("/")
    assert source.slice(1, [2]).expert_ids == [2]


@pytest.mark.parametrize("expert_ids", [[5], [0, 5], [-1], [-1, 0], [2**40]])
def test_an_expert_that_is_not_in_the_file_is_named(folder, expert_ids):
    with pytest.raises(CheckpointError, match=r"the file has 5 experts a layer") as caught:
        CheckpointSource.of(folder).slice(0, expert_ids)
    assert str(expert_ids) in str(caught.value)


@pytest.mark.parametrize("layer_index", [2, -1, 10**6])
def test_a_layer_without_experts_is_named(folder, layer_index):
    with pytest.raises(CheckpointError, match=f"layer {layer_index} has no experts"):
        CheckpointSource.of(folder).slice(layer_index, [0])


def test_layer_1_is_not_layer_10(tmp_path):
    model = model_of("2bit", num_layers=11)
    save_model(model, tmp_path / "model")
    read = CheckpointSource.of(tmp_path / "model").slice(1, [0])
    expected = slice_experts(experts_of(model, 1), 1, [0])
    assert all(np.array_equal(read.tensors[name], expected.tensors[name]) for name in expected.tensors)


def test_ids_out_of_order_are_refused(folder):
    with pytest.raises(ShapeError, match="ascending"):
        CheckpointSource.of(folder).slice(0, [3, 1])


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "noise", "a folder"])
def test_a_missing_or_damaged_file_is_a_checkpoint_error(folder, damage):
    source, path = CheckpointSource.of(folder), folder / TENSORS_NAME
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "noise": b"\xff" * len(whole)}[damage])
    with pytest.raises(CheckpointError, match=r"experts \[1\] of layer 0 cannot be read"):
        source.slice(0, [1])


@pytest.mark.parametrize("damage", ["no folder", "no config", "another format"])
def test_what_is_no_checkpoint_is_refused_when_it_is_named(folder, damage):
    if damage == "no folder":
        shutil.rmtree(folder)
    elif damage == "no config":
        (folder / CONFIG_NAME).unlink()
    else:
        (folder / CONFIG_NAME).write_text(json.dumps({"format": "other"}))
    with pytest.raises(CheckpointError):
        CheckpointSource.of(folder)
