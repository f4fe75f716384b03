import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_bitnet.cli.reporting import Results, load_results, to_report, write_report
from moe_bitnet.cli.reporting.summary import STEPS, step_command
from moe_bitnet.errors import DataError


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def metric(report: dict[str, Any], name: str, **detail: object) -> dict[str, Any]:
    found = [
        entry
        for entry in report["metrics"]
        if entry["metric"] == name and all(entry["detail"].get(key) == value for key, value in detail.items())
    ]
    assert len(found) == 1, (name, detail, found)
    (only,) = found
    assert isinstance(only, dict)
    return only


def read_strictly(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_report_numbers_equal_the_inputs(run_folder: Path) -> None:
    write_report(run_folder)
    sections = read_strictly(run_folder / "report" / "report.json")["sections"]
    for name in ("pack", "place", "generate", "context", "machine"):
        assert sections[name] == json.loads((run_folder / f"{name}.json").read_text())
    data = json.loads((run_folder / "data" / "summary.json").read_text())
    data.pop("unknown_key")
    assert sections["data"] == data
    for name, folder in (("ternary", "ternary"), ("twin", "float")):
        assert sections[name]["summary"] == json.loads((run_folder / folder / "summary.json").read_text())
        lines = [json.loads(line) for line in (run_folder / folder / "metrics.jsonl").read_text().splitlines()]
        assert sections[name]["evaluations"] == [line for line in lines if "validation_loss" in line]


def test_returned_report_is_the_written_one(run_folder: Path) -> None:
    assert write_report(run_folder) == read_strictly(run_folder / "report" / "report.json")


def test_headline_ratios_are_measured_over_baseline(run_folder: Path) -> None:
    report = to_report(load_results(run_folder))
    loss = metric(report, "demo.validation_loss_vs_twin")
    assert loss["value"] == pytest.approx(3.107 / 3.047)
    assert loss["baseline_value"] == 3.047
    assert metric(report, "demo.file_bytes_vs_fp16", layout="2bit")["value"] == pytest.approx(5_872_640 / 16_877_056)
    devices = metric(report, "demo.devices")
    assert (devices["value"], devices["baseline_value"], devices["unit"]) == (1, 4, "count")
    spread = metric(report, "demo.inter_device_bytes_per_token", run="ternary, spread")
    assert (spread["value"], spread["baseline_value"], spread["detail"]["formula"]) == (4996.0, 6528.0, 4640.0)
    assert metric(report, "demo.inter_device_bytes_per_token", run="ternary")["value"] == 0
    assert metric(report, "demo.max_context_multiple", format="4-bit")["value"] == pytest.approx(7360 / 2048)


def test_every_metric_has_the_keys_of_the_contract(run_folder: Path) -> None:
    for entry in to_report(load_results(run_folder))["metrics"]:
        assert set(entry) == {"metric", "value", "unit", "baseline", "baseline_value", "detail"}
        assert entry["metric"].startswith("demo.")


def test_missing_sections_are_listed_with_their_command(tmp_path: Path) -> None:
    report = to_report(load_results(tmp_path))
    assert [entry["section"] for entry in report["missing"]] == [name for name, _, _ in STEPS]
    assert all(entry["command"] == step_command(entry["section"]) for entry in report["missing"])
    assert report["metrics"] == report["comparison"] == []


def test_steps_name_the_fields_of_results() -> None:
    assert [name for name, _, _ in STEPS] == [field.name for field in dataclasses.fields(Results)][1:]


def test_absent_folder_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        load_results(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_numbers_that_are_not_finite_become_null(run_folder: Path, value: float | None) -> None:
    edit(run_folder / "ternary" / "summary.json", lambda summary: summary.update(validation_loss=value))
    edit(run_folder / "context.json", lambda context: context["formats"][2].update(ppl_common=value))
    edit(run_folder / "pack.json", lambda pack: pack.update(max_abs_logit_difference=value))
    with (run_folder / "ternary" / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 650, "tokens": 1, "validation_loss": value, "validation_ppl": value, "elapsed_s": 1})
        )
    write_report(run_folder)
    report = read_strictly(run_folder / "report" / "report.json")
    assert report["sections"]["ternary"]["summary"]["validation_loss"] is None
    assert metric(report, "demo.validation_loss_vs_twin")["value"] is None


@pytest.mark.parametrize(
    ("name", "field", "change"),
    [
        ("pack.json", "fp16_file_bytes", lambda value: value.update(fp16_file_bytes="many")),
        ("pack.json", "layouts[1].file_bytes", lambda value: value["layouts"][1].update(file_bytes=-1)),
        ("pack.json", "layouts", lambda value: value.update(layouts={})),
        ("place.json", "float16.num_devices", lambda value: value["float16"].pop("num_devices")),
        ("place.json", "ternary", lambda value: value.update(ternary=3)),
        ("generate.json", "runs[0].tokens_equal_single_process",
         lambda value: value["runs"][0].update(tokens_equal_single_process=1)),
        ("generate.json", "prompt", lambda value: value.update(prompt=None)),
        ("context.json", "formats[2].num_tokens", lambda value: value["formats"][2].update(num_tokens=1.5)),
        ("machine.json", "steps_s.data", lambda value: value["steps_s"].update(data="fast")),
        ("machine.json", "num_cores", lambda value: value.update(num_cores=True)),
        ("data/summary.json", "num_train_tokens", lambda value: value.update(num_train_tokens=[])),
        ("ternary/summary.json", "expert_load", lambda value: value["expert_load"][0].pop()),
        ("float/summary.json", "expert_load[0][0]", lambda value: value["expert_load"][0].__setitem__(0, "x")),
    ],
)  # fmt: skip
def test_malformed_field_is_named_with_its_file(
    run_folder: Path, name: str, field: str, change: Callable[[Any], None]
) -> None:
    edit(run_folder / name, change)
    with pytest.raises(DataError) as caught:
        write_report(run_folder)
    assert name in str(caught.value)
    assert f"'{field}'" in str(caught.value)
    assert not (run_folder / "report").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1} x', "[" * 100_000, '{"layouts": ' + "9" * 5000 + "}"])
def test_file_that_is_no_json_object_is_named(run_folder: Path, text: str) -> None:
    (run_folder / "pack.json").write_text(text)
    with pytest.raises(DataError, match=r"pack\.json"):
        load_results(run_folder)


def test_truncated_last_line_is_ignored(run_folder: Path) -> None:
    history = run_folder / "ternary" / "metrics.jsonl"
    before = load_results(run_folder)
    for cut in ('{"step": 610, "tok', '{"step": 610, "loss": 2.9\n', "{\n\n"):
        text = history.read_text()
        history.write_text(text + cut)
        assert load_results(run_folder) == before
        history.write_text(text)


def test_malformed_line_in_the_middle_is_named_by_number(run_folder: Path) -> None:
    history = run_folder / "float" / "metrics.jsonl"
    lines = history.read_text().splitlines()
    history.write_text("\n".join([*lines[:4], '{"step": 45, "lo', *lines[4:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl line 5"):
        load_results(run_folder)
    history.write_text("\n".join([*lines[:4], '{"step": 45, "tokens": 1}', *lines[4:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl.*line 5\.loss"):
        load_results(run_folder)


def test_resumed_run_replaces_what_came_after_its_checkpoint(run_folder: Path) -> None:
    history = run_folder / "ternary" / "metrics.jsonl"
    lines = history.read_text().splitlines(keepends=True)
    again = [line for line in lines if json.loads(line)["step"] > 300]
    history.write_text("".join(lines + again))
    section = load_results(run_folder).ternary
    assert section is not None
    steps = [point.step for point in section.points]
    assert steps == list(range(10, 601, 10))
    assert [point.step for point in section.evaluations] == list(range(50, 601, 50))


def test_unfinished_training_reports_its_last_evaluation(run_folder: Path) -> None:
    (run_folder / "ternary" / "summary.json").unlink()
    results = load_results(run_folder)
    assert results.ternary is not None
    last = results.ternary.evaluations[-1].validation_loss
    report = to_report(results)
    assert metric(report, "demo.validation_loss_vs_twin")["detail"]["measured"] == last
    assert [entry["section"] for entry in report["missing"]] == ["ternary"]


def test_control_codes_and_unpaired_surrogates_do_not_reach_the_report(run_folder: Path) -> None:
    edit(run_folder / "generate.json", lambda value: value.update(text="a\x1b[31mb\ud800c\nd\te"))
    report = write_report(run_folder)
    assert report["sections"]["generate"]["text"] == "a�[31mb�c\nd\te"
