import hashlib
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.training.fragment_file import FragmentFiles, write_fragments
from cluster.training.fragments import Fragment, share_of
from moe_bitnet.errors import CheckpointError

SHAPES = {"a": (5, 7), "b": (33,), "c": (2, 3, 11)}
TENSORS = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}


def run_of(name, start, count):
    return Fragment(name, SHAPES[name], start, TENSORS[name].flatten()[start : start + count].clone())


def write(folder, *files):
    """Write each list of (name, start, count) as a file; returns them opened."""
    paths = []
    for index, runs in enumerate(files):
        paths.append(folder / f"{index}.safetensors")
        write_fragments(paths[-1], [run_of(*run) for run in runs])
    return FragmentFiles(paths)


def divided(world_size):
    return [
        [(name, *share_of(tensor.numel(), rank, world_size)) for name, tensor in TENSORS.items()]
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
@pytest.mark.parametrize("num_readers", [1, 4])
def test_any_number_of_readers_gets_what_any_number_of_writers_had(tmp_path, world_size, num_readers):
    files = write(tmp_path, *divided(world_size))  # with 40 writers some have empty runs
    for name, tensor in TENSORS.items():
        parts = [files.read(name, *share_of(tensor.numel(), rank, num_readers)) for rank in range(num_readers)]
        assert torch.equal(torch.cat(parts), tensor.flatten())


def test_every_run_can_be_read(tmp_path):
    files = write(tmp_path, [("b", 20, 13), ("b", 0, 4)], [("b", 4, 16)])
    files.check({"b": (33,)})
    for start in range(34):
        for count in range(34 - start):
            assert torch.equal(files.read("b", start, count), TENSORS["b"][start : start + count])


def test_the_sum_is_that_of_the_file_and_safetensors_reads_it(tmp_path):
    path = tmp_path / "part.safetensors"
    sha256 = write_fragments(path, [run_of("a", 7, 14), run_of("c", 0, 66)])
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    tensors = load_file(path)
    assert set(tensors) == {"a@7", "c@0"}
    assert torch.equal(tensors["a@7"], TENSORS["a"].flatten()[7:21])


def test_a_worker_without_runs_writes_an_empty_file(tmp_path):
    write(tmp_path, [("b", 0, 33)], []).check({"b": (33,)})


@pytest.mark.parametrize(
    ("runs", "problem"),
    [
        ([("b", 0, 32)], "each of its 33 elements once"),
        ([("b", 1, 32)], "each of its 33 elements once"),
        ([("b", 0, 10), ("b", 11, 22)], "each of its 33 elements once"),
        ([("b", 0, 12), ("b", 11, 22)], "each of its 33 elements once"),
        ([("b", 0, 33), ("a", 0, 35)], "a is unknown"),
        ([("a", 0, 35)], "different|a is unknown"),
        ([], "b is missing"),
    ],
)
def test_runs_that_are_not_the_whole_once_are_refused(tmp_path, runs, problem):
    files = write(tmp_path, runs)
    with pytest.raises(CheckpointError, match=problem):
        files.check({"b": (33,)})


def test_another_shape_is_refused_before_anything_is_read(tmp_path):
    files = write(tmp_path, [("a", 0, 35)])
    with pytest.raises(CheckpointError, match=r"a is \[5, 7\], the model needs \[7, 5\]"):
        files.check({"a": (7, 5)})


@pytest.mark.parametrize("run", [("a", 30, 6), ("a", -1, 2), ("z", 0, 1), ("a", 0, 2**60)])
def test_elements_that_are_not_there_are_refused(tmp_path, run):
    files = write(tmp_path, [("a", 0, 35)])
    with pytest.raises(CheckpointError, match="were asked for"):
        files.read(*run)


def test_a_damaged_file_is_our_error(tmp_path):
    path = tmp_path / "0.safetensors"
    write_fragments(path, [run_of("a", 0, 35)])
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:20], struct.pack("<Q", 2**62) + whole[8:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"0\.safetensors"):
            FragmentFiles([path])


@pytest.mark.parametrize(
    ("tensors", "shapes"),
    [
        ({"a@0": torch.zeros(35)}, None),
        ({"a@0": torch.zeros(35)}, {}),
        ({"a@x": torch.zeros(35)}, {"a": [5, 7]}),
        ({"a@0": torch.zeros(5, 7)}, {"a": [5, 7]}),
        ({"a@0": torch.zeros(35, dtype=torch.float16)}, {"a": [5, 7]}),
        ({"a@0": torch.zeros(35)}, {"a": "wide"}),
    ],
)
def test_a_foreign_safetensors_file_is_refused(tmp_path, tensors, shapes):
    path = tmp_path / "0.safetensors"
    save_file(tensors, path, None if shapes is None else {"shapes": json.dumps(shapes)})
    with pytest.raises(CheckpointError, match="cannot be read as runs"):
        FragmentFiles([path])
