"""The owner's folder."""

import json

import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.files.safetensors import iterate_tensors
from gradot_jax.offsite.owner import load_bundle_digest, load_plan, save_owner

SCORES = {"layers.1.q_proj": np.arange(4, dtype=np.float32), "layers.1.mlp": np.ones(3, np.float32)}
CALIBRATION = {"source": "text.jsonl", "sequences": 8}


def test_owner_keeps_plan_scores_and_calibration(case, tmp_path):
    save_owner(tmp_path / "owner", case.plan, SCORES, CALIBRATION)
    assert load_plan(tmp_path / "owner") == case.plan
    stored = dict(iterate_tensors(tmp_path / "owner" / "scores.safetensors"))
    assert stored.keys() == SCORES.keys()
    assert all(np.array_equal(stored[name], SCORES[name]) for name in SCORES)
    assert json.loads((tmp_path / "owner" / "calibration.json").read_text()) == CALIBRATION


def test_method_without_scores_leaves_no_file_of_them(case, tmp_path):
    save_owner(tmp_path / "owner", case.plan, {}, CALIBRATION)
    assert not (tmp_path / "owner" / "scores.safetensors").exists()
    assert load_plan(tmp_path / "owner") == case.plan


def test_owner_knows_the_bundle_that_was_shipped(case, tmp_path):
    save_owner(tmp_path / "owner", case.plan, SCORES, {"bundle_digest": "0" * 64})
    assert load_bundle_digest(tmp_path / "owner") == "0" * 64
    save_owner(tmp_path / "owner", case.plan, SCORES, CALIBRATION, overwrite=True)
    with pytest.raises(InputError, match=r"calibration\.json: bundle_digest is None"):
        load_bundle_digest(tmp_path / "owner")


def test_older_record_is_replaced_only_when_asked(case, tmp_path):
    save_owner(tmp_path / "owner", case.plan, SCORES, CALIBRATION)
    with pytest.raises(InputError, match="overwrite"):
        save_owner(tmp_path / "owner", case.plan, SCORES, {})
    save_owner(tmp_path / "owner", case.plan, SCORES, {}, overwrite=True)
    assert json.loads((tmp_path / "owner" / "calibration.json").read_text()) == {}


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"layers": 3}'])
def test_damaged_plan_is_refused_by_file(case, tmp_path, text):
    save_owner(tmp_path / "owner", case.plan, SCORES, CALIBRATION)
    (tmp_path / "owner" / "plan.json").write_bytes(text)
    with pytest.raises(InputError, match=r"plan\.json"):
        load_plan(tmp_path / "owner")


def test_missing_plan_is_refused_by_file(tmp_path):
    with pytest.raises(InputError, match=r"plan\.json: missing"):
        load_plan(tmp_path)
