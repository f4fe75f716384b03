import json
import pickle

import pytest
import safetensors.torch
import torch
from factories import random_token_ids, tiny_config, tiny_model

from moe_bitnet.checkpoint.manifest import write_manifest
from moe_bitnet.checkpoint.native import load_model, read_info, read_tensors, save_model, write_model
from moe_bitnet.checkpoint.pack import model_layout, pack_model
from moe_bitnet.errors import CheckpointError

FILES = ("config.json", "manifest.json", "model.safetensors")
KINDS = ("ternary", "float", "2bit", "base3")


def make_model(kind, **changes):
    if kind in ("ternary", "float"):
        return tiny_model(precision=kind, **changes)
    return pack_model(tiny_model(**changes), kind)


@pytest.fixture(params=KINDS)
def model(request):
    return make_model(request.param)


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint of a 2-bit packed model."""
    folder = tmp_path / "model"
    save_model(make_model("2bit"), folder)
    return folder


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def assert_refused(folder, *parts):
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert all(part in str(caught.value) for part in (str(folder), *parts)), str(caught.value)


def change_tensors(folder, change):
    """Alter the tensors as someone would who also recomputes the manifest."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    safetensors.torch.save_file(tensors, str(path))
    write_manifest(folder)


def change_header(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    write_manifest(folder)


def change_config(folder, **changes):
    model = json.loads((folder / "config.json").read_text())["model"]
    change_header(folder, model={**model, **changes})


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_shared_experts": 1, "norm_recipe": "inner_norm"}, {"num_experts": 1, "top_k": 1},
     {"has_tied_embeddings": False, "activation": "squared_relu"}],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_round_trip_keeps_every_bit(kind, changes, tmp_path):
    model, token_ids = make_model(kind, **changes), random_token_ids(2, 7)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert not loaded.training
    assert loaded.config == model.config
    assert model_layout(loaded) == model_layout(model)
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)


def test_a_checkpoint_is_three_files(model, tmp_path):
    save_model(model, str(tmp_path / "deep" / "model"))
    assert sorted(file.name for file in (tmp_path / "deep" / "model").iterdir()) == sorted(FILES)
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["model"]
    load_model(str(tmp_path / "deep" / "model"))


def test_saving_twice_gives_the_same_bytes(model, tmp_path):
    for name in ("first", "second"):
        save_model(model, tmp_path / name)
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_loaded_latent_model_can_be_trained_on(tmp_path):
    save_model(make_model("ternary"), tmp_path / "model")
    loaded = load_model(tmp_path / "model").train()
    loaded(random_token_ids(1, 7)).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_what_a_checkpoint_is_can_be_read_without_its_weights(model, tmp_path):
    save_model(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    info = read_info(tmp_path / "model")
    assert info.config == model.config
    assert info.layout == model_layout(model)


@pytest.mark.parametrize("num_experts", [1, 5])
@torch.no_grad()
def test_a_twin_stored_in_float16_rounds_matrices_and_keeps_norms_and_routers(num_experts, tmp_path):
    model = tiny_model(precision="float", num_experts=num_experts, top_k=1)
    save_model(model, tmp_path / "model", float_dtype=torch.float16)
    loaded = load_model(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        is_kept = "norm" in name or "router" in name
        stored = loaded.state_dict()[name]
        assert stored.dtype == (torch.float32 if is_kept else torch.float16), name
        assert torch.equal(stored, tensor if is_kept else tensor.half()), name
    wide = tiny_model(precision="float", num_experts=num_experts, top_k=1)
    wide.load_state_dict({name: tensor.float() for name, tensor in loaded.state_dict().items()})
    token_ids = random_token_ids(1, 7)
    assert torch.equal(loaded(token_ids).logits, wide(token_ids).logits), "half precision is storage alone"


def test_the_dtype_of_floats_leaves_packed_layers_alone(tmp_path):
    model = make_model("base3")
    save_model(model, tmp_path / "model", float_dtype=torch.float16)
    loaded = load_model(tmp_path / "model").state_dict()
    for name, tensor in model.state_dict().items():
        if name.endswith(("_packed", "_scale")):
            assert loaded[name].dtype == tensor.dtype, name
            assert torch.equal(loaded[name], tensor), name
    assert loaded["embedding.weight"].dtype == torch.float16


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.98])
def test_a_truncated_file_is_refused(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    assert_refused(folder, name)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.9999])
def test_truncated_tensors_are_refused_even_with_a_right_manifest(folder, share):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    write_manifest(folder)
    assert_refused(folder, "model.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_refused(folder, name):
    content = (folder / name).read_bytes()
    # every part of a file: the header, the middle, the end
    for position in [*range(0, len(content), max(1, len(content) // 40)), len(content) - 1]:
        damaged = bytearray(content)
        damaged[position] ^= 1
        (folder / name).write_bytes(damaged)
        assert_refused(folder)
    (folder / name).write_bytes(content)
    load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert_refused(folder, name)
    write_manifest(folder)
    assert_refused(folder, name)


def test_a_missing_manifest_is_named(folder):
    (folder / "manifest.json").unlink()
    assert_refused(folder, "manifest.json")


def test_a_manifest_that_vouches_for_nothing_is_refused(folder):
    # Otherwise a damaged manifest would switch off the check of the weights.
    (folder / "manifest.json").write_text('{"files": {}}')
    assert_refused(folder)


def test_a_missing_folder_is_named(tmp_path):
    assert_refused(tmp_path / "nowhere")


def test_an_extra_tensor_is_refused(folder):
    change_tensors(folder, lambda tensors: tensors.update(stowaway=torch.zeros(1)))
    assert_refused(folder, "unknown ['stowaway']")


def test_a_missing_tensor_is_refused(folder):
    change_tensors(folder, lambda tensors: tensors.pop("norm.weight"))
    assert_refused(folder, "missing ['norm.weight']")


@pytest.mark.parametrize("name", ["norm.weight", "embedding.weight", "blocks.0.moe.experts.gate_packed",
                                  "blocks.1.attention.q_proj.weight_scale"])  # fmt: skip
@pytest.mark.parametrize(
    "change", [lambda x: x[:-1].contiguous(), lambda x: x.unsqueeze(0), lambda x: torch.cat((x, x))]
)
def test_a_wrong_shape_is_refused(folder, name, change):
    change_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name])}))
    assert_refused(folder, name)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("norm.weight", torch.int32), ("blocks.0.moe.experts.up_packed", torch.float32),
     ("blocks.0.moe.experts.up_packed", torch.int8), ("blocks.0.attention.o_proj.weight_packed", torch.int64)],
)  # fmt: skip
def test_a_wrong_dtype_is_refused(folder, name, dtype):
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert_refused(folder, name)


@pytest.mark.parametrize("layout", ["2bit", "base3"])
@pytest.mark.parametrize("part", ["experts.gate", "experts.up", "experts.down", "shared_experts.down",
                                  "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"])  # fmt: skip
def test_bytes_that_encode_no_weights_are_refused(layout, part, tmp_path):
    folder = tmp_path / "model"
    save_model(make_model(layout, num_shared_experts=1), folder)
    found = []

    def spoil(tensors):
        for name, tensor in tensors.items():
            if name.endswith(f".{part}_packed"):
                tensor.view(-1)[-1] = 255
                found.append(name)

    change_tensors(folder, spoil)
    assert len(found) == 2
    assert_refused(folder, f".{part}_packed", "encodes no ternary weights")


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 14}, {"vocab_size": 34}, {"intermediate_size": 8}, {"num_layers": 1}, {"num_layers": 3},
     {"num_experts": 6}, {"num_experts": 4}, {"num_shared_experts": 1}, {"num_kv_heads": 3}, {"head_dim": 6},
     {"has_tied_embeddings": False}, {"norm_recipe": "inner_norm"}],
)  # fmt: skip
def test_a_config_of_another_model_is_refused(folder, changes):
    change_config(folder, **changes)
    assert_refused(folder)


@pytest.mark.parametrize("changes", [{"precision": "int3"}, {"num_heads": 7}, {"hidden_size": 0}, {"hidden_size": "12"},
                                     {"top_k": 99}, {"surprise": 1}])  # fmt: skip
def test_an_impossible_config_is_refused_and_its_file_named(folder, changes):
    change_config(folder, **changes)
    assert_refused(folder, "config.json")


@pytest.mark.parametrize("changes", [{"hidden_size": 2**40}, {"vocab_size": 2**62}, {"intermediate_size": 10**30}])
def test_absurd_sizes_are_refused_without_taking_memory(folder, changes):
    change_config(folder, **changes)
    assert_refused(folder)


@pytest.mark.parametrize("layout", ["base3", None])
def test_another_layout_is_refused(folder, layout):
    change_header(folder, layout=layout)
    assert_refused(folder)


@pytest.mark.parametrize("layout", ["3bit", "", 2, ["2bit"]])
def test_an_unknown_layout_is_refused_and_its_file_named(folder, layout):
    change_header(folder, layout=layout)
    assert_refused(folder, "config.json")


def test_packed_float_weights_are_refused(folder):
    change_config(folder, precision="float")
    assert_refused(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None, 1.5])
def test_an_unknown_version_is_refused(folder, version):
    change_header(folder, format_version=version)
    assert_refused(folder, "config.json", f"format version {version!r}")


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "3", "{}", '{"format": "other"}', "[" * 100_000])
def test_a_config_that_is_none_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    write_manifest(folder)
    assert_refused(folder, "config.json")


@pytest.mark.parametrize("model", [None, [], "text"])
def test_a_config_without_a_model_is_refused(folder, model):
    change_header(folder, model=model)
    assert_refused(folder, "config.json")


def test_a_manifest_that_points_outside_is_refused(folder):
    (folder.parent / "x").write_text("")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files["../x"] = {"num_bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    assert_refused(folder, "../x")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("is_torch", [False, True])
def test_a_pickle_is_refused_and_not_executed(folder, tmp_path, is_torch):
    trace, path = tmp_path / "executed", folder / "model.safetensors"
    if is_torch:
        torch.save({"weight": Bomb(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(trace)))
    write_manifest(folder)
    assert_refused(folder, "model.safetensors")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace))).close()
    assert trace.exists(), "the bomb works, so its silence means something"


def test_tensors_of_another_kind_of_file_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    for content in (b"", b"GGUF" + bytes(100), b"\xff" * 100, (10**18).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
            read_tensors(path)


def test_saving_replaces_an_older_checkpoint_whole(folder):
    (folder / "left over").touch()
    new = make_model("float")
    save_model(new, folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    assert_same_state(load_model(folder).state_dict(), new.state_dict())


@pytest.mark.parametrize("step", ["write_model", "write_manifest"])
def test_an_interrupted_save_leaves_the_old_checkpoint(folder, monkeypatch, step):
    before = load_model(folder).state_dict()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(f"moe_bitnet.checkpoint.native.{step}", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(make_model("float"), folder)
    assert_same_state(load_model(folder).state_dict(), before)
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


def test_a_kill_between_the_renames_leaves_the_old_checkpoint_loadable(folder):
    before = load_model(folder).state_dict()
    unfinished = folder.with_name(".model.new-4194305")
    unfinished.mkdir()
    write_model(make_model("float"), unfinished)
    folder.rename(folder.with_name(".model.old-4194305"))
    assert_same_state(load_model(folder).state_dict(), before)


def test_a_kill_before_the_renames_leaves_the_old_checkpoint_and_the_next_save_works(folder):
    unfinished = folder.with_name(".model.new-4194305")
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert model_layout(load_model(folder)) == "2bit"
    save_model(make_model("float"), folder)
    assert load_model(folder).config.precision == "float"


def test_remains_of_a_killed_save_are_cleared_by_the_next(folder):
    unfinished = folder.with_name(".model.new-4194305")
    unfinished.mkdir()
    save_model(make_model("float"), folder)
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


def test_the_config_in_the_file_is_the_documented_one(folder):
    header = json.loads((folder / "config.json").read_text())
    assert header == {
        "format": "moe-bitnet", "format_version": 1, "layout": "2bit", "model": tiny_config().to_dict(),
    }  # fmt: skip
