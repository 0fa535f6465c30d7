"""All layers of a middle: swept, cut, kept, and gone on with."""

import shutil

import jax
import numpy as np
import pytest

from gradot_jax.calibration.passes import forward_layer, sweep_layer
from gradot_jax.errors import InputError
from gradot_jax.methods import layer_store, magnitude, scored
from gradot_jax.methods.compress import run_compression
from gradot_jax.methods.magnitude import MAGNITUDE
from gradot_jax.methods.options import CompressionOptions
from gradot_jax.models.split import AdapterSpec
from gradot_jax.parallel import make_mesh

SPLIT = AdapterSpec(1, 1)
RUNNING = ("checkpoints", "dtype", "offload", "mesh")
VARIANTS = {
    "uniform": {},
    "global": {"allocation": "global"},
    "refit": {"allocation": "global", "compensate_mlp": "refit", "compensate_attention": "refit"},
    "inputs": {"method": "activation-svd"},
    "weights": {"method": "magnitude"},
}


@pytest.fixture(scope="module")
def model(toy_model):
    return toy_model()


@pytest.fixture(scope="module")
def batches(toy_batch):
    batch = toy_batch()
    return [type(batch)(*(field[i : i + 4] for field in batch)) for i in (0, 4)]


def run(model, batches, **options):
    running = {name: options.pop(name) for name in RUNNING if name in options}
    options = CompressionOptions(budget=0.5, **options)
    return run_compression(*model, SPLIT, batches, options, **running)


def assert_equal(got, expected):
    assert got.plan == expected.plan and got.calibration == expected.calibration
    jax.tree.map(np.testing.assert_array_equal, got.emulator, expected.emulator)
    jax.tree.map(np.testing.assert_array_equal, got.scores, expected.scores)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_compression_goes_on_to_the_same_emulator(
    variant, model, batches, tmp_path, monkeypatch
):
    whole = run(model, batches, **VARIANTS[variant])
    save = layer_store.LayerStore.save

    def stop_after_the_first(store, layer, arrays, values):
        if store.finished:
            raise Stopped
        save(store, layer, arrays, values)

    with monkeypatch.context() as patch:
        patch.setattr(layer_store.LayerStore, "save", stop_after_the_first)
        with pytest.raises(Stopped):
            run(model, batches, checkpoints=tmp_path, **VARIANTS[variant])
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    saved = []
    monkeypatch.setattr(
        layer_store.LayerStore,
        "save",
        lambda store, layer, *rest: (saved.append(layer), save(store, layer, *rest)),
    )
    assert_equal(run(model, batches, checkpoints=tmp_path, **VARIANTS[variant]), whole)
    assert len(saved) == 2
    assert_equal(run(model, batches, checkpoints=tmp_path, **VARIANTS[variant]), whole)
    assert len(saved) == 2


def test_finished_layers_of_another_model_or_budget_are_refused(model, batches, tmp_path):
    run(model, batches, checkpoints=tmp_path)
    other = model[0], jax.tree.map(lambda leaf: leaf * 1.01, model[1])
    with pytest.raises(InputError, match="with other weights"):
        run(other, batches, checkpoints=tmp_path)
    with pytest.raises(InputError, match="with other options"):
        run(model, batches, method="random", checkpoints=tmp_path)


def test_a_lost_layer_is_made_again(model, batches, tmp_path):
    whole = run(model, batches, checkpoints=tmp_path)
    shutil.rmtree(tmp_path / "0001")
    assert_equal(run(model, batches, checkpoints=tmp_path), whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_in_host_memory_give_the_same_as_weights_on_a_device(variant, model, batches):
    config, params = model
    on_host = run((config, jax.device_get(params)), batches, **VARIANTS[variant])
    on_device = run(model, batches, **VARIANTS[variant])
    assert on_host.plan == on_device.plan
    jax.tree.map(np.testing.assert_array_equal, on_host.scores, on_device.scores)
    layers = (list(result.emulator.stored_layers()) for result in (on_host, on_device))
    jax.tree.map(np.testing.assert_array_equal, *layers)


def test_half_precision_storage_is_computed_in_float32(model, batches):
    config, params = model
    half = jax.tree.map(lambda leaf: leaf.astype("float16"), params)
    rounded = jax.tree.map(lambda leaf: leaf.astype("float32"), half)
    got, expected = run((config, half), batches), run((config, rounded), batches)
    assert got.plan == expected.plan
    jax.tree.map(np.testing.assert_array_equal, got.scores, expected.scores)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(got.emulator)} == {"float16"}


def test_every_layer_runs_the_same_compiled_passes(toy_model, batches):
    # Of a width of its own, so that nothing is compiled yet.
    model = toy_model(num_hidden_layers=7, ffn_dim=14)

    def compiled():
        return np.array([forward_layer._cache_size(), sweep_layer._cache_size()])

    before = compiled()
    run(model, batches)
    # One forward pass; back through the top adapter, and through the middle with factors.
    assert (compiled() - before).tolist() == [1, 2]
    run(model, batches)
    assert (compiled() - before).tolist() == [1, 2]


def test_every_layer_has_its_own_random_draw_on_a_run_that_goes_on(model, batches, tmp_path):
    whole = run(model, batches, method="random")
    run(model, batches, method="random", checkpoints=tmp_path)
    shutil.rmtree(tmp_path / "0002")
    assert_equal(run(model, batches, method="random", checkpoints=tmp_path), whole)


@pytest.mark.parametrize(
    ("variant", "mesh"),
    [("weights", (2, 1)), *((variant, mesh) for variant in VARIANTS for mesh in [(2, 4), (8, 1)])],
)
def test_a_mesh_chooses_and_cuts_as_one_device_does(
    variant, mesh, model, batches, assert_close, with_signs_of
):
    options = {"budget": 0.5} | VARIANTS[variant]
    one = run(model, batches, **VARIANTS[variant])
    many = run_compression(
        *model, SPLIT, batches, CompressionOptions(**options), mesh=make_mesh(*mesh)
    )
    assert many.plan == one.plan
    assert_close(many.scores, one.scores, "float32_model")
    got, expected = (list(result.emulator.stored_layers()) for result in (many, one))
    assert_close(with_signs_of(expected, got), expected, "float32_model")


@pytest.mark.parametrize(("workers", "expected"), [(8, [8, 4]), (None, [4, 4, 4])])
def test_layers_are_decomposed_as_many_at_once_as_there_are_workers_for(
    workers, expected, model, batches, monkeypatch
):
    # Those of GPUs are the devices; of CPUs and TPUs the processes, here one.
    sizes = []
    if workers is not None:
        monkeypatch.setattr(scored, "num_workers", lambda mesh: workers)

    def counted(kernels, factors, mesh):
        sizes.append(len(kernels))
        return MAGNITUDE.decompose(kernels, factors, mesh)

    monkeypatch.setattr(magnitude, "MAGNITUDE", MAGNITUDE._replace(decompose=counted))
    options = CompressionOptions(budget=0.5, method="magnitude")
    run_compression(*model, SPLIT, batches, options, mesh=make_mesh(8))
    assert sizes == expected


@pytest.mark.parametrize(
    ("mesh", "asked"), [(None, {"lambda_mlp": 0.5, "fisher": "mc"}), ((2, 4), {})]
)
def test_boundaries_in_host_memory_change_nothing(mesh, asked, model, batches):
    options = asked | {"mesh": mesh and make_mesh(*mesh)}
    assert_equal(run(model, batches, offload=True, **options), run(model, batches, **options))


def test_bfloat16_arithmetic_keeps_the_dtype_of_storage_and_scores_in_float32(
    model, batches, assert_close
):
    half, whole = (run(model, batches, dtype=dtype) for dtype in ("bfloat16", None))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.emulator)} == {"float32"}
    assert {score.dtype.name for score in half.scores.values()} == {"float32"}
    assert_close(half.scores, whole.scores, "bfloat16_model")
    assert half.calibration["loss"] != whole.calibration["loss"]
