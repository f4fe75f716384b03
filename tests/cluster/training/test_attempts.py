from cluster.training.attempts import ATTEMPTS_NAME, Attempt, append_attempt, num_restarts, read_attempts


def attempt(call, num_workers=2):
    return Attempt(call, "2030-01-02T03:04:05+00:00", num_workers, "cpu")


def test_attempts_come_back_and_damaged_lines_do_not(tmp_path):
    folder = tmp_path / "new"
    assert read_attempts(folder) == []
    append_attempt(folder, attempt("a"))
    with (folder / ATTEMPTS_NAME).open("a") as file:
        file.write('{"call": "a"}\n{"cal\n')
    append_attempt(folder, attempt("b", 1))
    assert read_attempts(folder) == [attempt("a"), attempt("b", 1)]


def test_restarts_are_those_of_the_last_call():
    assert num_restarts([]) == 0
    assert num_restarts([attempt("a"), attempt("a")]) == 1
    assert num_restarts([attempt("a"), attempt("a"), attempt("b")]) == 0
    assert num_restarts([attempt("a"), attempt("b"), attempt("b"), attempt("b")]) == 2
