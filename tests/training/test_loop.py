"""The loop over a state that is no adapter; what it shares with fine-tuning is tested there."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.nn.batch import Batch
from gradot_jax.training.loop import DivergenceError, StepMetrics, run_training


class Walk(NamedTuple):
    """A state of several kinds: trees, a key, integers, and nothing called an adapter."""

    place: dict[str, jax.Array]
    key: jax.Array
    visits: jax.Array


def batches(count=9):
    ones = np.ones((2, 3), np.float32)
    return [Batch(np.full((2, 3), i), np.full((2, 3), i), ones, ones) for i in range(count)]


def start():
    return Walk({"x": jnp.zeros(2)}, jax.random.key_data(jax.random.key(0)), jnp.zeros((), "int32"))


@jax.jit
def walk(state, number):
    key, drawn = jax.random.split(jax.random.wrap_key_data(state.key))
    x = state.place["x"] + number + jax.random.normal(drawn, (2,))
    return Walk({"x": x}, jax.random.key_data(key), state.visits + 1), x.sum()


def step(state, batch):
    state, loss = walk(state, jnp.float32(batch.input_ids[0, 0]))
    return state, StepMetrics(loss, loss, None)


def distance_from_ten(state):
    return abs(float(state.place["x"][0]) - 10)


def train(data=None, **settings):
    given = {"num_steps": 8, "keep": lambda state: state.place["x"]} | settings
    return run_training(step, start(), batches() if data is None else data, **given)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_without_validation_the_last_state_is_kept():
    trained = train()
    assert_equal(trained.kept, trained.state.place["x"])
    assert (int(trained.state.visits), trained.step, trained.loss) == (8, 8, None)


def test_with_validation_the_best_state_is_kept_and_the_last_returned():
    trained = train(validate=distance_from_ten, evaluate_every=1)
    paths = [train(num_steps=n).kept for n in range(1, 9)]
    distances = [10.0, *(abs(float(x[0]) - 10) for x in paths)]
    assert 0 < trained.step == int(np.argmin(distances)) < 8
    assert trained.loss == min(distances)
    assert_equal(trained.kept, paths[trained.step - 1])
    assert_equal(trained.state.place["x"], paths[-1])


@pytest.mark.parametrize("validate", [None, distance_from_ten])
def test_resumed_run_equals_uninterrupted_run_in_every_field(tmp_path, validate):
    settings = {"validate": validate, "evaluate_every": 2, "metrics_path": tmp_path / "metrics"}
    whole = train(**settings)
    records = (tmp_path / "metrics").read_text()
    settings |= {"checkpoints": tmp_path / "run", "identity": {"seed": 1}}
    train(**settings, num_steps=4)
    resumed = train(**settings, resume=True)
    assert_equal(resumed._replace(loss=0), whole._replace(loss=0))
    assert resumed.loss == whole.loss
    losses = [
        [(r["step"], r.get("loss"), r.get("validation_loss")) for r in map(json.loads, lines)]
        for lines in (records.splitlines(), (tmp_path / "metrics").read_text().splitlines())
    ]
    assert losses[0] == losses[1]
    # A finished run is read and not repeated.
    assert_equal(train([], **settings, resume=True).kept, whole.kept)


def test_checkpoints_of_another_identity_are_refused(tmp_path):
    train(checkpoints=tmp_path, identity={"seed": 1})
    with pytest.raises(InputError, match=r"identity\.seed was 1, now 2"):
        train(checkpoints=tmp_path, identity={"seed": 2}, resume=True)


def test_loss_that_is_not_finite_stops_the_run_at_its_step():
    data = batches()
    data[4] = data[4]._replace(input_ids=np.full((2, 3), np.nan))
    with pytest.raises(DivergenceError, match="at step 5 the loss is nan"):
        train(data)
