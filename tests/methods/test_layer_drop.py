import pytest

from gradot_jax.methods.layer_drop import kept_layers


@pytest.mark.parametrize("num_layers", [1, 2, 5, 8, 20])
def test_layers_are_evenly_spread_from_first_to_last(num_layers):
    for count in range(2, num_layers + 1):
        kept = kept_layers(num_layers, count)
        exact = [i * (num_layers - 1) / (count - 1) for i in range(count)]
        assert kept == tuple(round(place) for place in exact)
        assert kept[0] == 0 and kept[-1] == num_layers - 1 and len(set(kept)) == count
    assert kept_layers(num_layers, num_layers) == tuple(range(num_layers))


def test_halves_round_to_even_as_in_python():
    assert kept_layers(4, 3) == (0, 2, 3)
    assert kept_layers(6, 3) == (0, 2, 5)


def test_one_layer_is_the_middle_one_and_none_is_none():
    assert [kept_layers(m, 1) for m in (1, 2, 5, 6)] == [(0,), (0,), (2,), (2,)]
    assert kept_layers(5, 0) == ()
