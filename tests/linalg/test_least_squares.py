import numpy as np
import pytest

from gradot_jax.linalg.least_squares import refit_right, refit_rows

N = 20


def case(features, d_out, seed=0, dead=()):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, features)) @ rng.normal(size=(features, features))
    x[:, list(dead)] = 0
    return x, rng.normal(size=(features, d_out))


def rows_objective(x, w, kept, ridge):
    def objective(v):
        fit = np.square(x[:, kept] @ v - x @ w).sum() / N
        return fit + ridge * np.square(v - w[kept]).sum()

    return objective


def right_objective(metric, w, left):
    def objective(v):
        lost = w - left @ v
        return np.trace(lost.T @ metric @ lost)

    return objective


def assert_minimum(objective, solution):
    least = objective(solution)
    for seed in range(20):
        step = np.random.default_rng(seed).normal(size=solution.shape)
        assert objective(solution + 1e-2 * step / np.linalg.norm(step)) > least


@pytest.mark.parametrize(
    ("features", "d_out", "kept", "dead"),
    [(6, 4, [0, 2, 5], ()), (6, 1, [3], (0, 3)), (5, 3, [1, 2, 4], (2,)), (2, 5, [1], ())],
)
@pytest.mark.parametrize("damping", [1e-4, 0.1])
def test_rows_equal_direct_least_squares_and_are_optimal(
    features, d_out, kept, dead, damping, assert_close
):
    x, w = case(features, d_out, dead=dead)
    kept = np.array(kept)
    moment = x.T @ x / N
    mean = np.diag(moment)[kept].mean()
    ridge = damping * (mean if mean > 0 else 1)
    got = refit_rows(moment, w, kept, damping)
    root = np.sqrt(ridge)
    tall = np.concatenate([x[:, kept] / np.sqrt(N), root * np.eye(len(kept))])
    wanted = np.concatenate([x @ w / np.sqrt(N), root * w[kept]])
    assert_close(got, np.linalg.lstsq(tall, wanted, rcond=None)[0], "float64")
    assert_minimum(rows_objective(x, w, kept, ridge), got)


def test_rows_are_untouched_when_nothing_is_removed():
    x, w = case(5, 3)
    np.testing.assert_array_equal(refit_rows(x.T @ x, w, np.arange(5), 1e-4), w)


def test_dead_inputs_leave_rows_untouched():
    w = np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(
        refit_rows(np.zeros((4, 4)), w, np.array([1, 3]), 1e-4), w[[1, 3]]
    )


@pytest.mark.parametrize(
    ("features", "d_out", "rank"), [(6, 4, 2), (1, 1, 1), (5, 3, 3), (4, 6, 1)]
)
@pytest.mark.parametrize("dead", [(), (0,)])
def test_right_factor_equals_direct_least_squares_and_is_optimal(
    features, d_out, rank, dead, assert_close
):
    x, w = case(features, d_out, dead=dead)
    left = np.random.default_rng(1).normal(size=(features, rank))
    moment, damping = x.T @ x / N, 1e-2
    mean = np.trace(moment) / features
    metric = moment + damping * (mean if mean > 0 else 1) * np.eye(features)
    got = refit_right(moment, w, left, damping)
    root = np.linalg.cholesky(metric).T
    assert_close(got, np.linalg.lstsq(root @ left, root @ w, rcond=None)[0], "float64")
    assert_minimum(right_objective(metric, w, left), got)


def test_right_factor_of_a_component_of_value_zero_is_finite_and_fits_as_well(assert_close):
    x, w = case(5, 3)
    left = np.random.default_rng(1).normal(size=(5, 2))
    moment = x.T @ x / N
    with_zero = np.concatenate([left, np.zeros((5, 1))], axis=1)
    got = with_zero @ refit_right(moment, w, with_zero, 1e-4)
    assert_close(got, left @ refit_right(moment, w, left, 1e-4), "float64")


@pytest.mark.parametrize("refit", [refit_rows, refit_right])
def test_non_finite_moment_is_refused(refit):
    moment = np.eye(3)
    moment[0, 1] = np.nan
    kept = np.array([0]) if refit is refit_rows else np.ones((3, 1))
    with pytest.raises(ValueError, match="non-finite"):
        refit(moment, np.ones((3, 2)), kept, 1e-4)
