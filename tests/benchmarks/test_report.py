import json
import re
import sys

import pytest

from benchmarks import report
from benchmarks.report import BEGIN, END, PAGE, load_kinds, replace_section, section
from gradot_jax.errors import InputError


def _phase(seconds: float) -> dict:
    return {
        "median_seconds": seconds,
        "compile_seconds": 1.5,
        "gradients": 2.0,
        "fraction_of_floor": 0.5,
        "peak_bytes": 2**31,
        "before_bytes": 2**20,
        "times": 1,
    }


@pytest.fixture
def results(tmp_path):
    shape = {"num_bottom": 2, "num_middle": 8, "num_top": 2, "width": 768, "ffn": 3072}
    shape |= {"vocabulary": 50272, "num_batches": 2, "batch_size": 2, "length": 512}
    environment = {"device_kind": "cpu", "num_devices": 1, "num_cores": 2, "jax": "0.10.2"}
    rates = {"flops_per_second": 5e11, "exact_flops_per_second": 4e11, "bytes_per_second": 2e10}
    step = {"tokens_per_second": 3000.0, "speedup": 2.5, "program_bytes": 2**30}
    result = {
        "suite": "cpu",
        "workload": shape | {"dtype": "float32"},
        "environment": environment,
        "rates": rates,
        "phases": {"gradient": _phase(1.0), "compress": {"failed": "ended with code 1"}},
        "totals": {
            "calibration": {"over_floor": 1.3, "over_symmetric_floor": 1.5},
            "tuning": {"step_emulator": step | {"memory_reduction": 3.0, "peak_bytes": 2**31}},
        },
    }
    growth = {"suite": "cpu", "environment": environment, "exponents": {"width": {"step": 1.9}}}
    growth["points"] = [
        {"quantity": "width", "value": v, "seconds": {"step": v**1.9}} for v in (1, 2)
    ]
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    (folder / "opt-125m.json").write_text(json.dumps(result))
    (folder / "growth.json").write_text(json.dumps(growth))
    (tmp_path / "results" / "compare").mkdir()
    (tmp_path / "results" / "compare" / "result.json").write_text("{}")
    return tmp_path / "results"


def test_targets_come_first_and_cells_of_what_was_not_measured_are_empty(results):
    text = section(load_kinds(results))
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith("| target"))
    assert header == "| target | demanded | CPU | GPU | reached | where |"
    row = next(line for line in lines if line.startswith("| calibration with all factors"))
    assert row.split(" | ")[1:5] == ["≤ 1.25 x", "1.30 x", "", "no"]
    assert lines.index(header) < next(i for i, li in enumerate(lines) if li.startswith("| phase"))


def test_every_table_has_as_many_cells_in_each_row(results):
    for table in section(load_kinds(results)).split("\n\n"):
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1


def test_steps_beside_pytorch_and_predicted_memory_are_shown_where_they_were_measured(results):
    plain = section(load_kinds(results))
    assert "PyTorch's, CPU" not in plain and "Memory of" not in plain
    common = {"suite": "cpu", "environment": {"device_kind": "cpu"}}
    sides = {"step_emulator": 0.5, "step_full": 0.75, "torch": 1.0}
    step = {"median_seconds": sides, "over_torch": 2.0, "fraction_of_floor": sides}
    (results / "cpu" / "torch-step.json").write_text(
        json.dumps(common | {"workload": {"model": "llama"}, "threads": {"1": step, "2": {}}})
    )
    command = {"predicted_bytes": 2**30, "rest_bytes": 2**28, "peak_anonymous_bytes": 2**29}
    command |= {"over_predicted": 0.25, "model": "llama", "dtype": "bfloat16"}
    command |= {"checkpoint_bytes": 2**31}
    (results / "cpu" / "memory.json").write_text(json.dumps(common | {"compress": command}))
    text = section(load_kinds(results))
    assert "| llama | 1 | 500 ms | 1 s | 2.00 x | 50% | 100% |\n\n" in text
    row = "| llama: 2,048 MiB in bfloat16 | 1,024 MiB | 256 MiB | 512 MiB | 0.25 x |"
    assert row in text


def test_an_accelerators_results_take_the_place_of_the_empty_column(results):
    gpu = json.loads((results / "cpu" / "opt-125m.json").read_text())
    gpu |= {"suite": "device", "environment": gpu["environment"] | {"device_kind": "NVIDIA H200"}}
    gpu["phases"] = {"step_emulator": _phase(0.02)}
    (results / "nvidia-h200").mkdir()
    (results / "nvidia-h200" / "opt-125m.json").write_text(json.dumps(gpu))
    text = section(load_kinds(results))
    assert "| target | demanded | CPU | NVIDIA H200 | reached | where |" in text
    assert "| step emulator |  |  |  |  |  | 20 ms | 2.00 | 50% | 1.5 s | 2,048 MiB |" in text


def test_the_page_is_written_between_its_markers_and_checked(results, tmp_path, monkeypatch):
    page = tmp_path / "docs" / "SPEED.md"
    page.parent.mkdir()
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    command = ["report", "--results", str(results), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", [*command, "--check"])
    with pytest.raises(SystemExit, match="differ"):
        report.main()
    assert "old" in page.read_text()
    monkeypatch.setattr(sys, "argv", command)
    report.main()
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"\n{END}\nafter\n")
    assert "old" not in text
    assert "](../results/cpu/growth-width.png)" in text
    assert (results / "cpu" / "growth-width.png").stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", [*command, "--check"])
    report.main()


def test_the_committed_page_is_that_of_the_committed_results():
    text = PAGE.read_text()
    kinds = load_kinds(report.RESULTS)
    assert replace_section(text, section(kinds)) == text
    links = re.findall(r"!\[.*\]\((.*)\)", text)
    assert links and all((PAGE.parent / link).is_file() for link in links)


@pytest.mark.parametrize("text", ["", BEGIN, f"{END} {BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_page_without_its_markers_is_refused(text):
    with pytest.raises(InputError, match="once each"):
        replace_section(text, "new")


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(InputError, match="no results"):
        load_kinds(tmp_path)
