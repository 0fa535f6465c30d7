import doctest
from pathlib import Path

from benchmarks.report import RESULTS, load_kinds, replace_section, section
from gradot_jax.comparison.report import report
from gradot_jax.files.strict_json import read_json

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_code_in_the_readme_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = doctest.DocTestParser().get_doctest(README, {}, "README.md", "README.md", 0)
    assert len(blocks.examples) > 10
    results = doctest.DocTestRunner().run(blocks)
    assert results.failed == 0
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


def test_tables_in_the_readme_are_those_of_the_committed_comparison():
    folder = ROOT / "benchmarks" / "results" / "compare"
    table = (folder / "table.md").read_text()
    assert table.strip() in README
    # Numbers that JSON lacks are spelled there; none of them is in a finished comparison.
    assert report(read_json(folder / "result.json")) == table


def test_speed_in_the_readme_is_that_of_the_committed_results():
    kinds = load_kinds(RESULTS)
    assert replace_section(README, section(kinds)) == README
    growth = [kind for kind in kinds if "growth" in kind.results]
    assert all(list(kind.folder.glob("growth-*.png")) for kind in growth)
