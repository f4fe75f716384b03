import platform

from benchmarks.provenance import current_commit, installed_versions


def test_absent_packages_are_left_out():
    versions = installed_versions(("a-package-that-nobody-has",))
    assert versions["python"] == platform.python_version()
    assert "torch" in versions
    assert "a-package-that-nobody-has" not in versions


def test_the_commit_is_one_word():
    assert len(current_commit().split()) == 1
