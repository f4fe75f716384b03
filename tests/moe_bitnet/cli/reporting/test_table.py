import io
from pathlib import Path

import pytest
from rich.console import Console

from moe_bitnet.cli.reporting import load_results, print_report, to_report
from moe_bitnet.cli.reporting.summary import step_command


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120, color_system=None)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, what: str) -> list[str]:
    line = next(line for line in text.splitlines() if what in line)
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_table_shows_twin_ternary_and_ratio(run_folder: Path, console: Console) -> None:
    print_report(load_results(run_folder), console)
    text = printed(console)
    assert row(text, "validation loss") == ["validation loss (nats/token)", "3.047", "3.107", "+2.0 %"]
    assert row(text, "devices needed") == ["devices needed", "4", "1", "0.250×"]
    assert row(text, "per token (ternary)")[2:] == ["0 B on 1", "0×"]
    assert "not complete" not in text


def test_report_and_results_print_the_same(run_folder: Path) -> None:
    results = load_results(run_folder)
    texts = []
    for value in (results, to_report(results)):
        console = Console(file=io.StringIO(), width=100, color_system=None)
        print_report(value, console)
        texts.append(printed(console))
    assert texts[0] == texts[1]


def test_missing_steps_are_printed_with_their_command(run_folder: Path, console: Console) -> None:
    (run_folder / "place.json").unlink()
    print_report(load_results(run_folder), console)
    assert step_command("place") in printed(console)


def test_empty_run_prints_commands_only(tmp_path: Path, console: Console) -> None:
    print_report(load_results(tmp_path), console)
    assert "nothing to compare" in printed(console)
    assert step_command("data") in printed(console)


def test_names_of_a_run_are_not_read_as_console_markup(run_folder: Path, console: Console) -> None:
    path = run_folder / "generate.json"
    path.write_text(path.read_text().replace('"ternary, spread"', '"[/bold] [red]x"'))
    print_report(load_results(run_folder), console)
    assert "[/bold] [red]x" in printed(console)
