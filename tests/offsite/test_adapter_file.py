"""Tuned adapters: exact round trips, plug-in only where they belong, nothing hostile accepted."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.files.safetensors import iterate_tensors, write_tensors
from gradot_jax.models.split import Adapter, AdapterSpec, adapter_of
from gradot_jax.offsite.adapter_file import (
    adapter_report,
    check_adapter,
    load_adapter,
    load_adapter_for,
    save_adapter,
)
from gradot_jax.offsite.bundle import Bundle, receive
from gradot_jax.offsite.plug_in import plug_in
from gradot_jax.offsite.sealed_folder import base_digest, record_files


def make_bundle(folder: Path, case, **options) -> Bundle:
    case.write(folder, **options)
    return receive(folder)


@pytest.fixture(scope="module")
def bundle(case, tmp_path_factory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("owner") / "bundle", case)


@pytest.fixture(scope="module")
def tuned(case) -> Adapter:
    rng = np.random.default_rng(5)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.01 * rng.normal(size=leaf.shape), leaf.dtype),
        case.emulator.adapter,
    )


@pytest.fixture(scope="module")
def written(bundle, tuned, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data_owner") / "adapter"
    save_adapter(folder, tuned, bundle)
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "adapter"))


def edit_manifest(folder: Path, **changes) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(values | changes))


def reseal(folder: Path) -> None:
    records = record_files(folder)
    del records["manifest.json"]
    edit_manifest(folder, files={k: dataclasses.asdict(v) for k, v in records.items()})


def refused(folder: Path, config, *named: str) -> None:
    with pytest.raises(InputError) as caught:
        load_adapter(folder, config)
    for name in named:
        assert name in str(caught.value)


def test_adapter_returns_exactly(case, bundle, tuned, written):
    loaded, manifest = load_adapter(written, case.config)
    chex.assert_trees_all_equal(loaded, tuned)
    assert loaded.split == manifest.split == case.split
    assert manifest.emulator_digest == bundle.digest
    assert manifest.base_digest == bundle.manifest.base_digest


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_adapter_returns_exactly(make_case, tmp_path, dtype):
    case = make_case(dtype=dtype, do_layer_norm_before=False, word_embed_proj_dim=8)
    opened = make_bundle(tmp_path / "bundle", case)
    save_adapter(tmp_path / "adapter", case.emulator.adapter, opened, dtype=dtype)
    loaded, manifest = load_adapter(tmp_path / "adapter", case.config)
    chex.assert_trees_all_equal(loaded, case.emulator.adapter)
    chex.assert_trees_all_equal_dtypes(loaded, case.emulator.adapter)
    check_adapter(manifest, case.config, case.params)


@pytest.mark.parametrize("split", [AdapterSpec(0, 2), AdapterSpec(2, 0)])
def test_adapter_of_one_side_returns_with_its_empty_stack(case, tmp_path, split):
    adapter = adapter_of(case.params, split)
    emulator = case.emulator.replace(adapter=adapter)
    opened = make_bundle(tmp_path / "bundle", case, emulator=emulator)
    chex.assert_trees_all_equal(opened.emulator, emulator)
    save_adapter(tmp_path / "adapter", adapter, opened)
    loaded, manifest = load_adapter(tmp_path / "adapter", case.config)
    chex.assert_trees_all_equal(loaded, adapter)
    check_adapter(manifest, case.config, case.params)


def test_untuned_adapter_plugged_in_is_the_original(case, bundle, tmp_path):
    save_adapter(tmp_path / "a", bundle.emulator.adapter, bundle)
    loaded, manifest = load_adapter(tmp_path / "a", case.config)
    check_adapter(
        manifest, case.config, case.params, split=case.split, emulator_digest=bundle.digest
    )
    chex.assert_trees_all_equal(plug_in(case.params, loaded), case.params)


def test_adapter_folder_holds_weights_and_identity_only(written):
    assert sorted(os.listdir(written)) == ["README.md", "adapter.safetensors", "manifest.json"]
    values = json.loads((written / "manifest.json").read_text())
    identity = ["base_digest", "config", "emulator_digest", "split"]
    assert sorted(values) == sorted([*identity, "dtype", "files", "format", "format_version"])
    names = [name for name, _ in iterate_tensors(written / "adapter.safetensors")]
    assert {name.split(".")[3] for name in names} == {"0", "4"}


def test_adapter_of_another_shape_is_refused_on_saving(make_case, bundle, tmp_path):
    narrow = make_case(ffn_dim=24).emulator.adapter
    with pytest.raises(InputError, match="fc1"):
        save_adapter(tmp_path / "a", narrow, bundle)
    assert not list(tmp_path.iterdir())


def test_adapter_of_another_split_is_refused_on_saving(case, bundle, tmp_path):
    deeper = adapter_of(case.params, AdapterSpec(2, 1))
    with pytest.raises(InputError, match="num_bottom=2"):
        save_adapter(tmp_path / "a", deeper, bundle)
    assert not list(tmp_path.iterdir())


def test_diverged_adapter_is_refused_on_saving(bundle, tuned, tmp_path):
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), tuned)
    with pytest.raises(InputError, match=r"model\.decoder\.layers\.0\..* holds NaN"):
        save_adapter(tmp_path / "a", broken, bundle)
    assert not list(tmp_path.iterdir())


def test_adapter_of_another_model_is_refused(make_case, written):
    other = make_case(seed=1)
    _, manifest = load_adapter(written, other.config)
    with pytest.raises(InputError, match="another model: configuration and split agree"):
        check_adapter(manifest, other.config, other.params)


def test_adapter_of_another_configuration_is_refused_by_the_field(make_case, written):
    other = make_case(activation_function="gelu")
    refused(written, other.config, "activation_function is 'relu', expected 'gelu'")


def test_adapter_of_another_split_is_refused_at_plug_in(case, written):
    _, manifest = load_adapter(written, case.config)
    with pytest.raises(InputError, match="another split"):
        check_adapter(manifest, case.config, case.params, split=AdapterSpec(2, 1))


def test_adapter_tuned_in_another_bundle_is_refused_when_only_one_will_do(case, written):
    _, manifest = load_adapter(written, case.config)
    with pytest.raises(InputError, match="another bundle"):
        check_adapter(manifest, case.config, case.params, emulator_digest="0" * 64)


def test_adapter_is_run_only_in_the_bundle_it_was_tuned_in(case, bundle, tuned, written, tmp_path):
    loaded = load_adapter_for(written, bundle, dtype="bfloat16")
    chex.assert_trees_all_equal(loaded, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), tuned))
    other = make_bundle(tmp_path / "other", case, spec=case.spec(method="magnitude"))
    with pytest.raises(InputError, match="another bundle"):
        load_adapter_for(written, other)


def test_original_is_known_by_its_digest_though_the_emulator_was_cut_from_a_cast(case, tmp_path):
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), case.emulator)
    digest = base_digest(case.config, case.params, case.split)
    opened = make_bundle(tmp_path / "bundle", case, emulator=half, base_digest=digest)
    save_adapter(tmp_path / "adapter", opened.emulator.adapter, opened)
    _, manifest = load_adapter(tmp_path / "adapter", case.config)
    check_adapter(manifest, case.config, case.params)


def test_split_altered_in_the_manifest_is_refused(case, folder):
    edit_manifest(folder, split={"num_bottom": 0, "num_top": 2, "inner": []})
    refused(folder, case.config, "adapter.safetensors", "layers.3", "layers.0")


def test_base_digest_altered_in_the_manifest_is_refused(case, folder):
    edit_manifest(folder, base_digest="0" * 64)
    _, manifest = load_adapter(folder, case.config)
    with pytest.raises(InputError, match="another model"):
        check_adapter(manifest, case.config, case.params)


@pytest.mark.parametrize("name", ["README.md", "adapter.safetensors"])
def test_altered_byte_is_refused(case, folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    refused(folder, case.config, name, "SHA-256")


@pytest.mark.parametrize("name", ["README.md", "adapter.safetensors", "manifest.json"])
def test_missing_file_is_refused(case, folder, name):
    (folder / name).unlink()
    refused(folder, case.config, name)


@pytest.mark.parametrize("name", ["train.jsonl", "optimizer.safetensors", "tokenizer.json"])
def test_file_that_has_no_place_in_an_adapter_is_refused(case, folder, name):
    (folder / name).write_bytes(b"{}")
    refused(folder, case.config, name)
    reseal(folder)
    refused(folder, case.config, name)


def test_symbolic_link_is_refused(case, folder):
    (folder / "adapter.safetensors").rename(folder.parent / "elsewhere")
    (folder / "adapter.safetensors").symlink_to(folder.parent / "elsewhere")
    refused(folder, case.config, "symbolic link")


@pytest.mark.parametrize(
    ("array", "named"),
    [
        (np.full((16, 16), np.nan, np.float32), "NaN"),
        (np.zeros((16, 8), np.float32), "wrong shape"),
        (np.zeros((16, 16), np.float16), "wrong dtype"),
    ],
)
def test_altered_tensor_is_refused(case, folder, array, named):
    file, name = folder / "adapter.safetensors", "model.decoder.layers.4.self_attn.q_proj.weight"
    write_tensors(file, dict(iterate_tensors(file)) | {name: array})
    reseal(folder)
    refused(folder, case.config, "adapter.safetensors", name, named)


def test_bundle_is_not_read_as_an_adapter(case, tmp_path):
    make_bundle(tmp_path / "bundle", case)
    refused(tmp_path / "bundle", case.config, "format is 'gradot-bundle'")


def test_report_tells_how_far_each_block_moved(case):
    adapter = case.emulator.adapter
    doubled = adapter.replace(top=jax.tree.map(lambda leaf: 2 * leaf, adapter.top))
    bottom, top = adapter_report(case.config, case.params, doubled)
    assert (bottom.layer, bottom.relative, bottom.largest) == (0, 0.0, 0.0)
    assert top.layer == 4
    assert top.relative == pytest.approx(1.0)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(adapter.top))
    assert top.largest == pytest.approx(largest)
