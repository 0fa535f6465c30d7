"""What the README and the pages in docs say, held against the code and the committed results."""

import dataclasses
import doctest
import re
from pathlib import Path

import pytest

import gradot_jax
from benchmarks.report import load_kinds, replace_section, section
from benchmarks.targets import RESULTS
from gradot_jax.comparison.report import report
from gradot_jax.files.digest import json_digest
from gradot_jax.files.strict_json import read_json
from gradot_jax.methods.options import (
    CompressionOptions,
    CrashOptions,
    DistillationOptions,
    ScaleOTOptions,
)
from gradot_jax.methods.table import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
COMPARISON = ROOT / "benchmarks" / "results" / "smollm2-135m"
BUNDLED = ROOT / "benchmarks" / "results" / "bundled"
LONGEST_README = 160
LONGEST_WAY = 7


def page(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def without_code(text: str) -> str:
    """The prose of a page: what stands in fences or backquotes is no link."""
    return re.sub(r"`[^`\n]*`", "", without_fences(text))


def rows(text: str, width: int) -> dict[str, list[str]]:
    """The other cells of lines of tables of this width, by the name in backquotes in the first."""
    found = re.findall(r"^\| `([^`]+)` \|(.*)\|$", text, flags=re.MULTILINE)
    cells = ((name, [cell.strip() for cell in rest.split("|")]) for name, rest in found)
    return {name: own for name, own in cells if len(own) == width - 1}


def test_code_in_the_readme_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A fence would be read as what the line before it prints.
    text = re.sub(r"^```.*$", "", README, flags=re.MULTILINE)
    blocks = doctest.DocTestParser().get_doctest(text, {}, "README.md", "README.md", 0)
    assert len(blocks.examples) > 15
    results = doctest.DocTestRunner().run(blocks)
    assert results.failed == 0
    assert {path.name for path in (tmp_path / "bundle").iterdir()} >= {
        "manifest.json",
        "emulator.safetensors",
        "adapter.safetensors",
        "tokenizer.json",
    }
    assert (tmp_path / "adapter" / "manifest.json").is_file()
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= LONGEST_README


def test_results_in_the_readme_are_those_of_the_committed_comparison():
    summary = read_json(COMPARISON / "result.json")["summary"]
    measured = {(row["method"], row["budget"]): row for row in summary if row["task"] == "city"}
    shown = {name: cells for name, cells in rows(README, 3).items() if " / " in cells[0]}
    assert {"gradot", "layer-drop", "magnitude", "activation-svd", "gradot+"} <= shown.keys()
    for method, cells in shown.items():
        for cell, budget in zip(cells, (0.6, 0.3), strict=True):
            row = measured[method, budget]
            means = (row[name]["mean"] for name in ("emulator_finetuned", "plug_in"))
            assert cell == " / ".join(f"{mean:.1f}" for mean in means), (method, budget)


@pytest.mark.parametrize(
    ("folder", "name"), [(COMPARISON, "RESULTS.md"), (BUNDLED, "BUNDLED.md")], ids=["real", "toy"]
)
def test_tables_in_the_results_are_those_of_the_committed_comparison(folder, name):
    assert (folder / "table.md").read_text("utf-8").strip() in page(name)


def test_the_report_is_that_of_the_committed_result():
    # Numbers that JSON lacks are spelled there; none of them is in a finished comparison.
    table = (COMPARISON / "table.md").read_text("utf-8")
    assert report(read_json(COMPARISON / "result.json")) == table


def test_committed_cells_are_whole_and_name_no_place():
    cells = [sorted((folder / "cells").glob("*.json")) for folder in (COMPARISON, BUNDLED)]
    assert all(cells)
    for path in (path for of_one in cells for path in of_one):
        cell = read_json(path)
        assert {"cell", "result", "seconds", "environment", "settings"} <= cell.keys()
        assert path.stem.endswith(json_digest(cell["settings"])[:12])
        assert cell["environment"]["code"]
        assert "/" not in path.read_text("utf-8")


def options_of(recorded):
    """The options that a cell has on record, as values of today's."""
    nested = (DistillationOptions, CrashOptions, ScaleOTOptions)
    known = {field.name: type(field.default) for field in dataclasses.fields(CompressionOptions)}
    of_name = {name: kind for name, kind in known.items() if kind in nested}
    values = {n: of_name[n](**v) if n in of_name else v for n, v in recorded.items()}
    return CompressionOptions(**values)


def test_cells_on_record_are_those_that_a_comparison_looks_for():
    cells = map(read_json, sorted((COMPARISON / "cells").glob("compression-*.json")))
    recorded = [cell["settings"]["options"] for cell in cells]
    assert recorded
    for options in recorded:
        assert options_of(options).identity == options
    assert "skip_positions" in CompressionOptions(skip_positions=1).identity


def test_speed_in_the_docs_is_that_of_the_committed_results():
    kinds, text = load_kinds(RESULTS), page("SPEED.md")
    assert replace_section(text, section(kinds)) == text
    growth = [kind for kind in kinds if "growth" in kind.results]
    assert all(list(kind.folder.glob("growth-*.png")) for kind in growth)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text("utf-8")))
    relative = [link.split("#")[0] for link in links if not re.match(r"https?://|#", link)]
    missing = [link for link in relative if not (path.parent / link).exists()]
    assert not missing


def test_every_page_is_linked_from_the_readme():
    assert {f"docs/{path.name}" for path in DOCS.glob("*.md")} <= set(
        re.findall(r"\]\(([^)]+)\)", README)
    )


def test_every_method_is_in_the_readme_and_has_a_row_in_its_page():
    assert METHODS.keys() <= set(re.findall(r"`([^`\n]+)`", without_fences(README)))
    assert METHODS.keys() <= rows(page("METHODS.md"), 4).keys()


def test_every_folder_of_the_package_has_a_row():
    package = Path(gradot_jax.__file__).parent
    folders = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").is_file()}
    assert folders == {name for name in rows(page("STRUCTURE.md"), 3) if name.endswith("/")}


def test_the_way_of_a_calibration_token_is_short_and_as_described():
    steps = re.findall(r"^\d+\. `([^`]+)`: (.+?)(?=^\S|\n\n)", page("STRUCTURE.md"), re.M | re.S)
    assert 0 < len({path for path, _ in steps}) <= LONGEST_WAY
    for path, sentence in steps:
        source = (ROOT / path).read_text("utf-8")
        names = re.findall(r"`([A-Za-z_.]+)[`\[]", sentence)
        assert names, path
        for name in names:
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", source), (path, name)
