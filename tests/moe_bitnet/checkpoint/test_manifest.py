import hashlib
import json

import pytest

from moe_bitnet.checkpoint.manifest import verify_manifest, write_manifest
from moe_bitnet.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "first.bin").write_bytes(bytes(range(256)) * 7)
    (folder / "second.json").write_text("{}\n")
    (folder / "empty").touch()
    write_manifest(folder)
    return folder


def read(folder):
    return json.loads((folder / "manifest.json").read_text())


def write(folder, value):
    (folder / "manifest.json").write_text(json.dumps(value))


def test_a_whole_checkpoint_passes(folder):
    verify_manifest(folder)


def test_the_manifest_lists_every_file_with_size_and_sum(folder):
    files = read(folder)["files"]
    assert sorted(files) == ["empty", "first.bin", "second.json"]
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        assert entry == {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_writing_twice_gives_the_same_manifest(folder):
    before = (folder / "manifest.json").read_bytes()
    write_manifest(folder)
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", ["first.bin", "second.json"])
@pytest.mark.parametrize("share", [0, 0.5, 0.9])
def test_a_truncated_file_is_named(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=rf"{name}.*truncated or altered"):
        verify_manifest(folder)


def test_a_longer_file_is_named(folder):
    with (folder / "empty").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="empty: has 4 bytes, 0 were written"):
        verify_manifest(folder)


@pytest.mark.parametrize("position", [0, 77, 1791])
def test_one_flipped_bit_is_found(folder, position):
    content = bytearray((folder / "first.bin").read_bytes())
    content[position] ^= 1
    (folder / "first.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"first\.bin: its content was altered"):
        verify_manifest(folder)


def test_a_missing_file_is_named(folder):
    (folder / "second.json").unlink()
    with pytest.raises(CheckpointError, match=r"second\.json is missing"):
        verify_manifest(folder)


def test_a_directory_in_place_of_a_file_is_refused(folder):
    (folder / "empty").unlink()
    (folder / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty is missing"):
        verify_manifest(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: there is no such checkpoint folder"):
        verify_manifest(tmp_path / "nowhere")


def test_a_folder_without_a_manifest_is_refused(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint: is not a checkpoint.*manifest\.json"):
        verify_manifest(folder)


@pytest.mark.parametrize("name", ["../outside", "inner/file", "..", ".", "", "/etc/hostname"])
def test_a_name_that_leaves_the_folder_is_refused_even_if_the_sums_are_right(folder, name):
    content = b"a file outside"
    (folder.parent / "outside").write_bytes(content)
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_bytes(content)
    entry = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write(folder, {"files": {name: entry}})
    with pytest.raises(CheckpointError) as caught:
        verify_manifest(folder)
    assert name in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "null", "[]", "{}", '"files"', '{"files": null}', '{"files": []}', '{"files": {"empty": null}}',
        '{"files": {"empty": {}}}', '{"files": {"empty": {"num_bytes": 0}}}', '{"files": {"empty": []}}',
        '{"files": {"empty": {"num_bytes": "x", "sha256": ""}}}',
        '{"files": {"empty": {"num_bytes": null, "sha256": ""}}}',
        '{"files": {"empty": {"num_bytes": 1e999, "sha256": ""}}}',
        "[" * 100_000,
    ],
    ids=range(16),
)  # fmt: skip
def test_a_damaged_manifest_is_named(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json: is damaged"):
        verify_manifest(folder)


def test_a_manifest_that_is_not_utf8_is_named(folder):
    (folder / "manifest.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"manifest\.json: is damaged"):
        verify_manifest(folder)


def test_an_interrupted_swap_is_repaired_first(folder):
    folder.rename(folder.with_name(".checkpoint.old-4194305"))
    verify_manifest(folder)
    assert folder.is_dir()
