import json
import math

import pytest

from gradot_jax.comparison.cells import CellStore
from gradot_jax.errors import InputError


def refuse():
    raise AssertionError("a finished cell was computed again")


def test_a_finished_cell_is_not_computed_again(tmp_path):
    store = CellStore(tmp_path)
    first = store.get("run", {"seed": 0}, lambda: {"value": 1.5})
    assert store.get("run", {"seed": 0}, refuse) == first == {"value": 1.5}


def test_other_settings_are_another_cell(tmp_path):
    store = CellStore(tmp_path)
    store.get("run", {"seed": 0}, lambda: {"value": 1})
    assert store.get("run", {"seed": 1}, lambda: {"value": 2}) == {"value": 2}
    assert len(list(tmp_path.iterdir())) == 2


def test_numbers_that_json_lacks_come_back(tmp_path):
    store = CellStore(tmp_path)
    for _ in range(2):
        cell = store.get("run", {}, lambda: {"a": [math.inf, -math.inf], "b": math.nan})
        assert cell["a"] == [math.inf, -math.inf] and math.isnan(cell["b"])


def test_a_cell_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError):
        CellStore(tmp_path).get("run", {}, refuse)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["half a ce", "[]", json.dumps({"settings": {"seed": 7}})])
def test_what_is_no_cell_is_refused_with_its_name(tmp_path, content):
    store = CellStore(tmp_path)
    store.path("run", {}).write_text(content)
    with pytest.raises(InputError, match="not a cell"):
        store.get("run", {}, refuse)


def test_a_cell_under_another_name_is_refused(tmp_path):
    store = CellStore(tmp_path)
    store.get("run", {"seed": 0}, lambda: {})
    store.path("run", {"seed": 0}).rename(store.path("run", {"seed": 1}))
    with pytest.raises(InputError, match="other settings"):
        store.get("run", {"seed": 1}, refuse)
