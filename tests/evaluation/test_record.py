import getpass
import json
import math
import platform
from pathlib import Path

import pytest

import gradot_jax
from gradot_jax.errors import InputError
from gradot_jax.evaluation.record import environment, write_result


def test_the_environment_is_json_and_names_versions_and_devices():
    record = json.loads(json.dumps(environment()))
    assert record["gradot_jax"] == gradot_jax.__version__
    assert record["python"] == platform.python_version()
    assert record["platform"] == "cpu" and record["num_devices"] == 8
    assert {"jax", "flax", "optax", "numpy", "device_kind"} <= record.keys()


def test_the_environment_does_not_tell_machine_user_or_folder():
    text = json.dumps(environment())
    assert platform.node() not in text
    assert str(Path.home()) not in text
    assert f'"{getpass.getuser()}"' not in text


def test_a_result_is_read_back_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_result(path, {"task": "top", "scores": (1, 2.5), "nested": {"none": None}})
    assert json.loads(path.read_text()) == {
        "task": "top",
        "scores": [1, 2.5],
        "nested": {"none": None},
    }
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_a_result_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_result(tmp_path / "result.json", {})
    plain, result = (tmp_path / name for name in ("plain", "result.json"))
    assert result.stat().st_mode == plain.stat().st_mode


def test_a_diverged_number_survives_as_text(tmp_path):
    values = {"a": math.nan, "b": [math.inf, -math.inf]}
    write_result(tmp_path / "result.json", values)
    read = json.loads((tmp_path / "result.json").read_text())
    assert math.isnan(float(read["a"]))
    assert [float(number) for number in read["b"]] == values["b"]


def test_a_failed_write_leaves_the_older_result_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_result(path, {"old": 1})
    with pytest.raises(TypeError):
        write_result(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder: cannot be written: Is a directory"):
        write_result(tmp_path / "folder", {"new": 1})
    with pytest.raises(InputError, match=r"cannot be written: File exists"):
        write_result(path / "below.json", {"new": 1})
    (tmp_path / "folder").rmdir()
    assert list(tmp_path.iterdir()) == [path]
