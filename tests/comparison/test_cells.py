import json
import math
import multiprocessing

import pytest

from gradot_jax.comparison.cells import CellStore, NotThere
from gradot_jax.errors import InputError

WHERE = {"method": "gradot", "budget": 0.6, "draw": None, "seed": 0}


def refuse():
    raise AssertionError("a finished cell was computed again")


def get(store, compute, **settings):
    return store.get("run", WHERE, settings, compute)


def test_a_finished_cell_is_not_computed_again(tmp_path):
    store = CellStore(tmp_path / "cells")
    first = get(store, lambda: {"value": 1.5}, seed=0)
    assert get(store, refuse, seed=0) == first
    assert first["result"] == {"value": 1.5} and first["seconds"] >= 0
    assert WHERE.items() <= first.items()
    assert {"code", "commit", "jax", "device_kind"} <= first["environment"].keys()


def test_its_name_says_where_it_belongs(tmp_path):
    assert CellStore(tmp_path).path("run", WHERE, {}).name.startswith("run-gradot-0.6-0-")


def test_other_settings_are_another_cell(tmp_path):
    store = CellStore(tmp_path / "cells")
    get(store, lambda: {"value": 1}, seed=0)
    assert get(store, lambda: {"value": 2}, seed=1)["result"] == {"value": 2}
    assert len(list((tmp_path / "cells").iterdir())) == 2


def test_numbers_that_json_lacks_come_back(tmp_path):
    store = CellStore(tmp_path / "cells")
    for _ in range(2):
        cell = get(store, lambda: {"a": {"x": math.inf, "y": -math.inf}, "b": math.nan})["result"]
        assert cell["a"] == {"x": math.inf, "y": -math.inf} and math.isnan(cell["b"])


def test_a_cell_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError):
        get(CellStore(tmp_path / "cells"), refuse)
    assert not list((tmp_path / "cells").iterdir())


def test_a_store_that_computes_nothing_says_what_is_not_there(tmp_path):
    with pytest.raises(NotThere, match="run-gradot"):
        get(CellStore(tmp_path / "cells", computes=False), refuse)
    assert not (tmp_path / "cells").exists()


WHOLE = {"settings": {"cell": "run"}, "environment": {"code": "c0de"}}
RESULT = {"development_loss": 1.0, "best_step": 2, "seconds": 3.0, "plug_in": {"score": 4.0}}


@pytest.mark.parametrize(
    "content",
    [
        "half a ce",
        "[]",
        "[" * 200_000,
        json.dumps({"settings": {"seed": 7}}),
        json.dumps(WHOLE | {"result": None}),
        json.dumps(WHOLE | {"result": {}}),
        json.dumps(WHOLE | {"result": RESULT | {"seconds": "3 s"}}),
        json.dumps(WHOLE | {"result": RESULT | {"plug_in": {"score": True}}}),
        json.dumps(WHOLE | {"result": RESULT, "environment": {}}),
        json.dumps(WHOLE | {"result": RESULT})[:-1] + ', "result": {}}',
    ],
)
def test_what_is_no_cell_is_refused_with_its_name(tmp_path, content):
    store = CellStore(tmp_path / "cells")
    path = store.path("run", WHERE, {"cell": "run"})
    path.write_text(content)
    with pytest.raises(InputError, match="not a cell") as refused:
        get(store, refuse, cell="run")
    assert str(path) in str(refused.value)


def test_a_whole_cell_of_others_is_taken(tmp_path):
    store = CellStore(tmp_path / "cells")
    path = store.path("run", WHERE, {"cell": "run"})
    path.write_text(json.dumps(WHOLE | {"result": RESULT}))
    assert get(store, refuse, cell="run")["result"] == RESULT


def test_a_cell_under_another_name_is_refused(tmp_path):
    store = CellStore(tmp_path / "cells")
    get(store, dict, seed=0)
    store.path("run", WHERE, {"seed": 0}).rename(store.path("run", WHERE, {"seed": 1}))
    with pytest.raises(InputError, match="other settings"):
        get(store, refuse, seed=1)


def _fill(folder, log, barrier):
    def compute():
        with log.open("a") as file:
            file.write("computed\n")
        return {"value": 1}

    barrier.wait()
    get(CellStore(folder), compute)


def test_no_two_processes_compute_the_same_cell(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, log = context.Barrier(3), tmp_path / "log"
    arguments = (tmp_path / "cells", log, barrier)
    processes = [context.Process(target=_fill, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "computed\n"
