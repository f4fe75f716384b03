import array
import math

from cluster.training.standard_library import describe_c_modules, describe_module, is_library_source, library_folder


def test_the_folder_holds_the_sources():
    assert (library_folder() / "json" / "decoder.py").is_file()


def test_files_that_differ_between_machines_are_no_sources():
    assert is_library_source("os.py")
    assert not is_library_source("_sysconfigdata__linux.py")
    assert not is_library_source("data.txt")


def test_every_c_module_has_a_text_of_its_own():
    documents = {document.name: document.text for document in describe_c_modules()}
    assert documents["docstrings/math"] == describe_module(math)
    assert len(set(documents.values())) == len(documents) > 20


def test_docstrings_of_c_modules_hold_no_values():
    text = describe_module(math)
    assert text.startswith("math\n\n")
    assert "math.gcd(*integers)\n    Greatest Common Divisor." in text
    assert str(math.pi)[:4] not in text
    assert "class array.array" in describe_module(array)
    assert "append(v, /)" in describe_module(array)
