"""Emulators whose depth differs from the original's: shared blocks, harmonizers, inner blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.compression.plan import HarmonizerShape, LayerShape
from gradot_jax.errors import InputError
from gradot_jax.models.opt.block import LAYOUT
from gradot_jax.models.params import Shared, count_params, get_block, unstack_blocks
from gradot_jax.models.run import apply_layer, embed, forward, head
from gradot_jax.models.split import AdapterSpec, adapter_of, split_model
from gradot_jax.nn.harmonizer import Harmonizer, harmonize
from gradot_jax.nn.linear import Dense
from gradot_jax.offsite.adapter_file import check_adapter, load_adapter, save_adapter
from gradot_jax.offsite.bundle import receive, ship
from gradot_jax.offsite.describe import describe
from gradot_jax.offsite.emulator import build_emulator
from gradot_jax.offsite.export import export_params
from gradot_jax.offsite.plug_in import plug_in

IDS = np.arange(8).reshape(2, 4) % 24
SPREAD = AdapterSpec(1, 1, (2,))
DENSE = LayerShape(ranks=tuple((site, None) for site in LAYOUT.low_rank), num_channels=32)


def harmonizer(width: int, rank: int) -> Harmonizer:
    rng = np.random.default_rng(0)
    shapes = ((width, rank), (rank,), (rank, width), (width,))
    down, down_bias, up, up_bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    return Harmonizer(Dense(down, down_bias), Dense(up, up_bias))


def run_by_hand(config, shell, layers) -> np.ndarray:
    hidden = embed(config, shell, IDS)
    for layer in layers:
        if isinstance(layer, Harmonizer):
            hidden = harmonize(layer, hidden)
        else:
            hidden = apply_layer(config, layer, hidden)
    return np.asarray(head(config, shell, hidden))


def original_layers(params):
    return [get_block(params.segments[0], i) for i in range(params.num_layers)]


@pytest.fixture(scope="module")
def shared(case):
    """Layers 1 and 3 between trained 0, 2 and 4; 1 runs twice and a harmonizer once."""
    original = original_layers(case.params)
    adapter = adapter_of(case.params, SPREAD)
    layers = [original[1], original[3], harmonizer(case.config.hidden_size, 3)]
    return build_emulator(case.params.shell, adapter, layers, (0, 0, None, 1, 2))


def untouched(case):
    """The layers between a spread adapter as they are, declared to be an emulator."""
    original = original_layers(case.params)
    adapter = adapter_of(case.params, SPREAD)
    return build_emulator(case.params.shell, adapter, [original[1], original[3]], (0, None, 1))


def save(path, case, emulator, last):
    """Writes an emulator of two dense layers and a last one of some shape."""
    spec = case.spec(shapes=(DENSE, DENSE, last), layer_map=emulator.layer_map)
    # Five places are more than a model of five layers leaves between its ends.
    config = dataclasses.replace(case.config, num_hidden_layers=7)
    return config, ship(path, config, spec, emulator)


def save_untouched(path, case):
    emulator = untouched(case)
    spec = case.spec(shapes=(DENSE, DENSE), layer_map=emulator.layer_map)
    case.write(path, emulator, spec)
    return receive(path)


def test_layers_run_in_the_order_of_the_map(case, shared):
    original = original_layers(case.params)
    first, second, map_end = shared.stored_layers()
    by_hand = [original[0], first, first, original[2], second, map_end, original[4]]
    np.testing.assert_allclose(
        forward(case.config, shared.assemble(), IDS),
        run_by_hand(case.config, case.params.shell, by_hand),
        rtol=2e-5,
        atol=2e-5,
    )
    assert shared.assemble().num_layers == 7
    assert len(unstack_blocks(shared.assemble().segments)) == 7


def test_the_map_is_read_off_the_emulator(shared):
    assert shared.layer_map == (0, 0, None, 1, 2)
    assert shared.inner_after == (1,)


def test_sharing_stores_a_block_once(case, shared):
    block = count_params(original_layers(case.params)[0])
    small = count_params(harmonizer(case.config.hidden_size, 3))
    assert count_params(shared.middle) == 2 * block + small
    assert isinstance(shared.middle[0], Shared)


def test_harmonizer_with_a_zero_up_projection_is_the_identity():
    small = harmonizer(6, 2)
    small = small.replace(up=jax.tree.map(jnp.zeros_like, small.up))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 6)), jnp.float32)
    np.testing.assert_array_equal(harmonize(small, x), x)


@pytest.mark.parametrize("split", [AdapterSpec(1, 1), SPREAD, AdapterSpec(0, 0, (0, 3))])
def test_split_model_is_the_original(case, split):
    whole = split_model(case.params, split)
    again = unstack_blocks(whole.assemble().segments)
    jax.tree.map(np.testing.assert_array_equal, again, original_layers(case.params))


def test_bundle_returns_an_emulator_of_another_depth_exactly(case, shared, tmp_path):
    config, digest = save(tmp_path / "bundle", case, shared, HarmonizerShape(rank=3))
    bundle = receive(tmp_path / "bundle")
    assert bundle.digest == digest and bundle.config == config
    assert bundle.emulator.layer_map == shared.layer_map
    jax.tree.map(np.testing.assert_array_equal, bundle.emulator, shared)
    lines = describe(tmp_path / "bundle")
    assert lines["layer map"] == "0 0 adapter 1 2"
    assert lines["middle 2"] == "harmonizer of rank 3"


def test_harmonizer_of_another_shape_than_planned_is_refused(case, shared, tmp_path):
    with pytest.raises(InputError, match=r"middle layer 2: planned LayerShape.*Harmonizer"):
        save(tmp_path / "b", case, shared, DENSE)
    with pytest.raises(InputError, match=r"middle layer 2, down: .*\(16, 3\).*\(16, 4\)"):
        save(tmp_path / "b", case, shared, HarmonizerShape(rank=4))
    assert not list(tmp_path.iterdir())


def test_spread_adapter_comes_back_to_its_own_layers(case, tmp_path):
    bundle = save_untouched(tmp_path / "bundle", case)
    tuned = jax.tree.map(lambda leaf: leaf + 1, bundle.emulator.adapter)
    save_adapter(tmp_path / "adapter", tuned, bundle)
    adapter, manifest = load_adapter(tmp_path / "adapter", case.config)
    check_adapter(manifest, case.config, case.params, split=SPREAD, emulator_digest=bundle.digest)
    plugged = original_layers(plug_in(case.params, adapter))
    for index, (new, old) in enumerate(zip(plugged, original_layers(case.params), strict=True)):
        change = 1 if index in (0, 2, 4) else 0
        expected = jax.tree.map(lambda leaf, change=change: leaf + change, old)
        jax.tree.map(np.testing.assert_array_equal, new, expected)


def test_adapter_with_a_wrong_layer_map_is_refused(case, tmp_path):
    bundle = save_untouched(tmp_path / "bundle", case)
    save_adapter(tmp_path / "adapter", bundle.emulator.adapter, bundle)
    _, manifest = load_adapter(tmp_path / "adapter", case.config)
    with pytest.raises(InputError, match="another split"):
        check_adapter(manifest, case.config, case.params, split=AdapterSpec(1, 1, (3,)))
    moved = dataclasses.replace(manifest, split=AdapterSpec(1, 1, (3,)))
    with pytest.raises(InputError, match="another model"):
        check_adapter(moved, case.config, case.params)


def test_shared_blocks_are_exported_once_per_place(case):
    original = original_layers(case.params)
    adapter = adapter_of(case.params, AdapterSpec(1, 1))
    emulator = build_emulator(case.params.shell, adapter, original[1:3], (0, 0, 1))
    config, exported = export_params(case.config, emulator.assemble())
    assert config.num_hidden_layers == 5
    np.testing.assert_allclose(
        forward(config, exported, IDS),
        forward(case.config, emulator.assemble(), IDS),
        rtol=2e-5,
        atol=2e-5,
    )


def test_harmonizers_are_not_exported(case, shared):
    with pytest.raises(InputError, match="harmonizers"):
        export_params(case.config, shared.assemble())


def test_map_without_a_place_for_an_inner_block_is_refused(case):
    adapter = adapter_of(case.params, SPREAD)
    with pytest.raises(ValueError, match="0 places for the 1 inner blocks"):
        build_emulator(case.params.shell, adapter, original_layers(case.params)[1:2])


def test_the_original_split_in_parts_is_not_shipped(case, tmp_path):
    with pytest.raises(InputError, match="holds an Emulator, got SplitModel"):
        whole = split_model(case.params, SPREAD)
        case.write(tmp_path / "b", whole)
