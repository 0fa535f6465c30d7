import numpy as np
import pytest

from benchmarks.decomposition import ALGORITHMS, KINDS, grow, matrices


def test_every_algorithm_is_measured_on_every_kind():
    *_, record = grow([8], ALGORITHMS, 60.0)
    assert record["complete"] and not record["left_out"]
    points = {(p["algorithm"], p["kind"]): p for p in record["points"]}
    assert points.keys() == {(algorithm, kind) for algorithm in ALGORITHMS for kind in KINDS}
    for point in points.values():
        assert max(point["residual"], point["orthogonality"]) < 1e-5
        rate = 4 * 20 / 3 * 8**3 / point["median_seconds"] / 1e9
        np.testing.assert_allclose(point["gigaflops"], rate)


def test_what_would_take_too_long_is_left_out():
    *_, record = grow([4, 4096], ["svd"], 1.0)
    assert [point["size"] for point in record["points"]] == [4, 4]
    assert record["left_out"] == [{"algorithm": "svd", "size": 4096}] and not record["complete"]


@pytest.mark.parametrize(("kind", "least"), [("random", 1), ("decaying", 1e3)])
def test_values_of_each_kind_spread_as_said(kind, least):
    values = np.linalg.svd(np.asarray(matrices(32, kind), np.float64), compute_uv=False)
    assert (values[:, 0] / values[:, -1] > least).all()
