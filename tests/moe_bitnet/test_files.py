import json
from pathlib import Path

import pytest

from moe_bitnet.files import recover_directory, replace_directory, write_json_atomically, write_text_atomically


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


def write_old(path, text="old"):
    path.mkdir(parents=True)
    (path / "content").write_text(text)


def test_text_replaces_a_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_text_atomically(path, "first")
    write_text_atomically(path, "zweite ✓\n")
    assert path.read_text(encoding="utf-8") == "zweite ✓\n"
    assert names_in(path.parent) == ["file.txt"]


def test_a_failed_write_leaves_the_old_text(tmp_path):
    path = tmp_path / "file.txt"
    write_text_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "a lone surrogate \ud800")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file.txt"]


def test_json_is_readable_and_not_escaped(tmp_path):
    path = tmp_path / "file.json"
    write_json_atomically(path, {"name": "é", "sizes": [1, 7]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "é", "sizes": [1, 7]}
    assert "é" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("has_predecessor", [False, True])
def test_a_directory_takes_the_place_whole(tmp_path, has_predecessor):
    path = tmp_path / "deep" / "model"
    if has_predecessor:
        write_old(path)
        (path / "only in the old one").touch()
    with replace_directory(path) as new:
        assert names_in(new) == []
        (new / "content").write_text("new")
        (new / "inner").mkdir()
        (new / "inner" / "file").write_text("more")
    assert names_in(path) == ["content", "inner"]
    assert (path / "content").read_text() == "new"
    assert names_in(path.parent) == ["model"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("has_predecessor", [False, True])
def test_an_exception_leaves_what_was_there(tmp_path, error, has_predecessor):
    path = tmp_path / "model"
    if has_predecessor:
        write_old(path)

    def write_half():
        with replace_directory(path) as new:
            (new / "content").write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert names_in(tmp_path) == (["model"] if has_predecessor else [])
    assert not has_predecessor or (path / "content").read_text() == "old"


def test_a_failed_second_rename_brings_the_old_one_back(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write_old(path)
    rename = Path.rename

    def fail_into_place(self, target):
        if ".new-" in self.name:
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(OSError, match="no space left"), replace_directory(path) as new:
        (new / "content").write_text("new")
    assert (path / "content").read_text() == "old"
    assert names_in(tmp_path) == ["model"]


@pytest.mark.parametrize("name", ["model", "model.v1", "run[1]", "what*", "with space"])
def test_a_kill_between_the_renames_is_undone(tmp_path, name):
    path = tmp_path / name
    write_old(tmp_path / f".{name}.old-4194305")
    write_old(tmp_path / f".{name}.new-4194305", "new")
    recover_directory(path)
    assert (path / "content").read_text() == "old"


def test_a_kill_after_the_renames_keeps_the_new_one(tmp_path):
    path = tmp_path / "model"
    write_old(path, "new")
    write_old(tmp_path / ".model.old-4194305")
    recover_directory(path)
    assert (path / "content").read_text() == "new"
    assert names_in(tmp_path) == ["model"]


def test_the_next_save_after_a_kill_leaves_only_the_new_one(tmp_path):
    path = tmp_path / "model"
    write_old(tmp_path / ".model.old-4194305")
    with replace_directory(path) as new:
        (new / "content").write_text("new")
    assert (path / "content").read_text() == "new"
    assert names_in(tmp_path) == ["model"]


@pytest.mark.parametrize(("name", "other"), [("model", "other"), ("o*", "other"), ("model", "model.old-backup")])
def test_recovery_touches_no_other_directory(tmp_path, name, other):
    write_old(tmp_path / name)
    write_old(tmp_path / f".{other}.old-1")
    recover_directory(tmp_path / name)
    recover_directory(tmp_path / "absent" / name)
    assert names_in(tmp_path) == sorted([f".{other}.old-1", name])


def test_what_a_living_process_is_swapping_is_left_alone(tmp_path):
    # process 1 lives on every machine
    for name in (".model.old-1", ".model.new-1"):
        write_old(tmp_path / name)
    recover_directory(tmp_path / "model")
    assert names_in(tmp_path) == [".model.new-1", ".model.old-1"]
