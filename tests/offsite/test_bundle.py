"""Bundles: exact round trips, nothing of the original middle inside, nothing hostile accepted."""

import dataclasses
import hashlib
import json
import os
import shutil
import weakref
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from gradot_jax.errors import InputError
from gradot_jax.files import safetensors
from gradot_jax.files.safetensors import iterate_tensors, write_tensors
from gradot_jax.models.checkpoint import load_model, save_model
from gradot_jax.models.opt.block import LAYOUT
from gradot_jax.models.params import count_params, layers_at
from gradot_jax.models.run import forward
from gradot_jax.models.split import AdapterSpec, adapter_of
from gradot_jax.offsite.adapter_file import load_adapter, save_adapter
from gradot_jax.offsite.bundle import receive, ship
from gradot_jax.offsite.card import count_parameters
from gradot_jax.offsite.emulator import build_emulator
from gradot_jax.offsite.sealed_folder import base_digest

FILES = ("README.md", "adapter.safetensors", "emulator.safetensors")

VARIANTS = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "post_norm_projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 8},
    "untied": {"tie_word_embeddings": False},
    "bare": {"enable_bias": False, "layer_norm_elementwise_affine": False},
}


@pytest.fixture(scope="module")
def written(case, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    case.write(folder)
    return folder


@pytest.fixture
def bundle(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "bundle"))


def test_an_emulator_on_the_host_is_written_as_one_on_a_device(case, written, on_host, tmp_path):
    params = on_host(case.params)
    layers = jax.tree.map(np.asarray, list(case.emulator.stored_layers()))
    emulator = build_emulator(params.shell, adapter_of(params, case.split), layers)
    case.write(tmp_path / "bundle", emulator)
    for file in written.iterdir():
        assert (tmp_path / "bundle" / file.name).read_bytes() == file.read_bytes()
    assert base_digest(case.config, params, case.split) == base_digest(
        case.config, case.params, case.split
    )


def test_one_tensor_at_a_time_is_cast_and_written(case, tmp_path, monkeypatch):
    cast, alive = [], []
    original = safetensors.cast_finite

    def follow(*arguments):
        array = original(*arguments)
        alive.append(sum(reference() is not None for reference in cast))
        cast.append(weakref.ref(array))
        return array

    monkeypatch.setattr(safetensors, "cast_finite", follow)
    case.write(tmp_path / "bundle", dtype="float16")
    assert len(cast) > 20 and max(alive) <= 1


def _set(*path):
    *parents, key, value = path

    def change(values):
        for parent in parents:
            values = values[parent]
        values[key] = value

    return change


def edit_manifest(folder: Path, change) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


def reseal(folder: Path) -> None:
    """Lists the files as they now are, as one who alters them on purpose would."""

    def change(values):
        values["files"] = {
            path.name: {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "bytes": path.stat().st_size,
            }
            for path in folder.iterdir()
            if path.name != "manifest.json"
        }

    edit_manifest(folder, change)


def edit_tensors(path: Path, change) -> None:
    tensors = dict(iterate_tensors(path))
    change(tensors)
    write_tensors(path, tensors)
    reseal(path.parent)


def refused(folder: Path, *named: str) -> None:
    """Asserts that a bundle is refused with a message that names all of `named`."""
    before = sorted(os.listdir(folder))
    with pytest.raises(InputError) as caught:
        receive(folder)
    for name in named:
        assert name in str(caught.value)
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_bundle_returns_the_emulator_exactly(variant, make_case, tmp_path):
    case = make_case(**VARIANTS[variant])
    digest = case.write(tmp_path / "b")
    loaded = receive(tmp_path / "b")
    chex.assert_trees_all_equal(loaded.emulator, case.emulator)
    chex.assert_trees_all_equal_dtypes(loaded.emulator, case.emulator)
    assert loaded.config == case.config
    assert loaded.manifest.split == case.split
    assert loaded.manifest.emulator == case.plan.emulator
    assert loaded.digest == digest
    assert len(loaded.emulator.middle) == 2


def test_an_emulator_of_other_sizes_than_planned_is_refused(case, tmp_path):
    def pad(stack):
        def widen(array, axis):
            return jnp.concatenate([array, jnp.zeros_like(array)], axis)

        v_proj = stack.v_proj.replace(
            left=widen(stack.v_proj.left, -1), right=widen(stack.v_proj.right, -2)
        )
        fc1 = stack.fc1.replace(kernel=widen(stack.fc1.kernel, -1), bias=widen(stack.fc1.bias, -1))
        return stack.replace(
            v_proj=v_proj, fc1=fc1, fc2=stack.fc2.replace(kernel=widen(stack.fc2.kernel, -2))
        )

    padded = case.emulator.replace(middle=tuple(map(pad, case.emulator.middle)))
    # Zeros beyond the planned size are sizes that were not planned, too.
    with pytest.raises(InputError, match=r"middle layer 0, v_proj: .*\(16, 10\).*\(16, 5\)"):
        case.write(tmp_path / "b", padded)
    shapes = case.plan.emulator.shapes
    smaller = tuple(dataclasses.replace(shape, num_channels=7) for shape in shapes)
    with pytest.raises(InputError, match=r"middle layer 0, fc1: .*\(16, 12\).*\(16, 7\)"):
        case.write(tmp_path / "b", spec=case.spec(shapes=smaller))
    factored = (*shapes[:2], shapes[0])
    with pytest.raises(InputError, match=r"middle layer 2, q_proj: got Dense .*, planned LowRank"):
        case.write(tmp_path / "b", spec=case.spec(shapes=factored))
    assert not list(tmp_path.iterdir())


def test_full_original_cannot_be_shipped_by_mistake(case, tmp_path):
    with pytest.raises(InputError, match="Emulator, got Params"):
        case.write(tmp_path / "b", case.params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "a b\n"}, "method"),
        ({"attention_budget": 0.0}, "budget attention"),
        ({"shapes": ()}, "layer_map"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(case, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        case.write(tmp_path / "b", spec=case.spec(**changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float64", "int8", "no such", np.dtype("float64")])
def test_a_dtype_in_which_weights_are_not_stored_is_refused(case, written, tmp_path, dtype):
    with pytest.raises(InputError, match=r"dtype .* is not one of float32, float16, bfloat16"):
        case.write(tmp_path / "b", dtype=dtype)
    with pytest.raises(InputError, match=r"dtype .* is not one of float32, float16, bfloat16"):
        receive(written, dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [jnp.float32, np.dtype("float32"), jnp.bfloat16, np.float16])
def test_a_dtype_is_taken_in_every_form_that_jax_takes(case, tmp_path, dtype):
    model, bundle, tuned = (tmp_path / name for name in ("model", "bundle", "tuned"))
    save_model(model, case.config, case.params, dtype=dtype)
    config, params = load_model(model, dtype=dtype)
    ship(bundle, config, case.plan, case.emulator, dtype=dtype)
    received = receive(bundle, dtype=dtype)
    save_adapter(tuned, received.emulator.adapter, received, dtype=dtype)
    adapter, manifest = load_adapter(tuned, config, dtype=dtype)
    assert received.manifest.dtype == manifest.dtype == jnp.dtype(dtype).name
    for tree in (load_model(model, dtype=None)[1], params, received.emulator, adapter):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}


def test_number_out_of_range_of_the_stored_dtype_is_refused(case, tmp_path):
    tables = case.emulator.shell.replace(embed_tokens=case.emulator.shell.embed_tokens + 1e6)
    with pytest.raises(InputError, match=r"embed_tokens.weight holds numbers out of the range"):
        case.write(tmp_path / "b", case.emulator.replace(shell=tables), dtype="float16")
    assert not list(tmp_path.iterdir())


def test_emulator_can_be_stored_and_loaded_in_other_dtypes(case, tmp_path):
    case.write(tmp_path / "b", dtype="bfloat16")
    stored, cast = receive(tmp_path / "b"), receive(tmp_path / "b", dtype="float32")
    assert stored.manifest.dtype == "bfloat16"
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), case.emulator)
    chex.assert_trees_all_equal(stored.emulator, expected)
    chex.assert_trees_all_equal(
        cast.emulator, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), expected)
    )


def test_loaded_emulator_computes_the_same_logits(case, written):
    loaded = receive(written)
    ids = jnp.arange(8).reshape(1, 8)
    chex.assert_trees_all_equal(
        forward(loaded.config, loaded.emulator.assemble(), ids),
        forward(case.config, case.emulator.assemble(), ids),
    )


def test_no_matrix_of_the_original_middle_is_in_the_bundle(make_case, tmp_path):
    case = make_case()
    # The planned dense matrix is the original's by intent; here every matrix is compressed.
    spec = case.spec(shapes=case.plan.emulator.shapes[:2], layer_map=(0, 1))
    case.write(tmp_path / "b", case.emulator.replace(middle=case.emulator.middle[:1]), spec)
    shipped = {
        array.tobytes()
        for name in ("emulator.safetensors", "adapter.safetensors")
        for _, array in iterate_tensors(tmp_path / "b" / name)
    }
    # Norms, and biases of the residual stream, have nothing to compress and go along.
    for block in layers_at(case.params.segments, case.split.middle_layers(5)):
        secret = [np.asarray(getattr(block, site.name).kernel) for site in LAYOUT.sites]
        for array in (*secret, np.asarray(block.fc1.bias)):
            assert array.tobytes() not in shipped
            assert np.ascontiguousarray(array.T).tobytes() not in shipped


def test_bundle_names_no_place_and_no_kept_index(written):
    assert sorted(os.listdir(written)) == sorted([*FILES, "manifest.json"])
    values = json.loads((written / "manifest.json").read_text())
    assert {key for layer in values["middle"] for key in layer} == {"ranks", "num_channels"}
    text = (written / "manifest.json").read_text() + (written / "README.md").read_text()
    for place in (str(written.parent), str(Path.home()) + "/", os.uname().nodename):
        assert place not in text


def test_a_plan_is_shipped_without_its_kept_indices(case, written, tmp_path):
    layers = tuple(
        dataclasses.replace(
            layer,
            components=tuple(
                (site, kept and tuple(16 - len(kept) + i for i in kept))
                for site, kept in layer.components
            ),
            channels=tuple(31 - i for i in reversed(layer.channels)),
        )
        for layer in case.plan.layers
    )
    other = dataclasses.replace(case.plan, layers=layers)
    assert other.emulator == case.plan.emulator and other != case.plan
    for name, plan in (("one", case.plan), ("other", other)):
        ship(tmp_path / name, case.config, plan, case.emulator)
        for file in (*FILES, "manifest.json"):
            assert (tmp_path / name / file).read_bytes() == (written / file).read_bytes()


def test_where_only_shapes_go_what_is_kept_is_not_accepted(case, tmp_path):
    with pytest.raises(AttributeError):
        case.write(tmp_path / "b", spec=case.spec(shapes=case.plan.layers))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer_map", [(0, 1), (0, 1, 1), (0, 0, 1, 2), (0, None, 1, 2)])
def test_a_plan_of_another_layer_map_than_the_emulator_is_not_shipped(case, tmp_path, layer_map):
    plan = dataclasses.replace(case.plan, layer_map=layer_map)
    with pytest.raises(InputError, match=r"layer map is .*, the emulator's \(0, 1, 2\)"):
        ship(tmp_path / "b", case.config, plan, case.emulator)
    assert not list(tmp_path.iterdir())


def test_a_plan_of_another_split_than_the_emulator_is_not_shipped(case, tmp_path):
    plan = dataclasses.replace(case.plan, num_bottom=2, num_top=0)
    with pytest.raises(InputError, match=r"plan has .*num_bottom=2.*, the emulator .*=1"):
        ship(tmp_path / "b", case.config, plan, case.emulator)
    assert not list(tmp_path.iterdir())


def test_equal_emulators_make_byte_identical_bundles(case, written, tmp_path):
    case.write(tmp_path / "b")
    for name in (*FILES, "manifest.json"):
        assert (tmp_path / "b" / name).read_bytes() == (written / name).read_bytes()


def test_counts_of_parameters_agree_with_the_arrays(case, written):
    counts = count_parameters(receive(written).manifest)
    assert counts.original == count_params(case.params)
    assert counts.shipped == count_params(case.emulator)
    assert counts.unchanged == count_params((case.emulator.shell, case.emulator.adapter))


def test_base_digest_names_model_and_split_in_any_dtype(make_case, written):
    case, half, other = make_case(), make_case(dtype="float16"), make_case(seed=1)

    def digest(chosen, split=case.split):
        return base_digest(chosen.config, chosen.params, split)

    assert digest(case) == receive(written).manifest.base_digest
    assert digest(other) != digest(case)
    assert digest(case, AdapterSpec(2, 1)) != digest(case)
    wide = dataclasses.replace(
        half, params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half.params)
    )
    assert digest(wide) == digest(half)


def test_base_digest_does_not_depend_on_the_middle(case):
    blocks = case.params.segments[0]
    altered = jax.tree.map(lambda leaf: leaf.at[2].add(1.0), blocks)
    params = case.params.replace(segments=(altered,))
    assert base_digest(case.config, params, case.split) == base_digest(
        case.config, case.params, case.split
    )


@pytest.fixture
def tokenizer_folder(tmp_path):
    """A tokenizer of four words, as a checkpoint of someone's has it."""
    folder = tmp_path / "model"
    folder.mkdir()
    words = {word: index for index, word in enumerate(("<unk>", "</s>", "the", "cat"))}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(folder / "tokenizer.json"))
    settings = {"name_or_path": "/home/someone/model", "auto_map": {"x": "y"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


def test_tokenizer_goes_along_without_its_local_paths(case, tokenizer_folder, tmp_path):
    case.write(tmp_path / "b", tokenizer_from=tokenizer_folder)
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text()) == {
        "eos_token": "</s>"
    }
    assert not (tmp_path / "b" / "modeling.py").exists()
    tokenizer = receive(tmp_path / "b").tokenizer
    assert tokenizer("cat the dog").input_ids == [3, 2, 0] and tokenizer.eos_token == "</s>"
    assert receive(tmp_path / "b", with_tokenizer=False).tokenizer is None


def test_a_bundle_without_a_tokenizer_is_received_with_none(written):
    assert receive(written).tokenizer is None


def test_a_damaged_tokenizer_is_refused(bundle):
    (bundle / "tokenizer.json").write_text('{"model": {}}')
    reseal(bundle)
    refused(bundle, str(bundle), "cannot be loaded as a tokenizer")
    assert receive(bundle, with_tokenizer=False).tokenizer is None


def test_tokenizer_settings_that_name_code_are_refused(bundle):
    (bundle / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "x.Evil"}}')
    reseal(bundle)
    refused(bundle, "tokenizer_config.json", "auto_map")


def test_older_bundle_is_replaced_only_when_asked(case, bundle):
    with pytest.raises(InputError, match="overwrite"):
        case.write(bundle)
    case.write(bundle, overwrite=True)
    receive(bundle)


@pytest.mark.parametrize("name", FILES)
def test_altered_byte_is_refused(bundle, name):
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    refused(bundle, name, "SHA-256")


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_missing_file_is_refused(bundle, name):
    (bundle / name).unlink()
    refused(bundle, name)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_truncated_file_is_refused(bundle, name):
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:-9])
    refused(bundle, name)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_symbolic_link_is_refused(bundle, name):
    (bundle / name).rename(bundle.parent / name)
    (bundle / name).symlink_to(bundle.parent / name)
    refused(bundle, name, "symbolic link")


def test_swapped_files_are_refused(bundle):
    (bundle / "adapter.safetensors").rename(bundle / "spare")
    (bundle / "emulator.safetensors").rename(bundle / "adapter.safetensors")
    (bundle / "spare").rename(bundle / "emulator.safetensors")
    refused(bundle, ".safetensors", "bytes")


def test_file_that_is_not_listed_is_refused(bundle):
    (bundle / "notes.txt").write_text("hello")
    refused(bundle, "notes.txt", "not listed")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_opt.py", "config.json"])
def test_file_that_has_no_place_in_a_bundle_is_refused_even_if_listed(bundle, name):
    (bundle / name).write_bytes(b"x")
    reseal(bundle)
    refused(bundle, name, "no place")


def test_folder_in_a_bundle_is_refused(bundle):
    (bundle / "README.md").unlink()
    (bundle / "README.md").mkdir()
    refused(bundle, "README.md")


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "a/b", "", ".hidden", "a\0b", "\x1b[31m"]
)
def test_name_that_leads_out_of_the_folder_is_refused(bundle, name):
    def change(values):
        values["files"][name] = values["files"]["README.md"]

    edit_manifest(bundle, change)
    with pytest.raises(InputError) as caught:
        receive(bundle)
    assert "files: name" in str(caught.value)
    assert str(caught.value).isprintable()


def test_vast_sparse_file_is_refused_before_it_is_read(bundle):
    with (bundle / "emulator.safetensors").open("r+b") as file:
        file.truncate(2**40)

    def change(values):
        values["files"]["emulator.safetensors"]["bytes"] = 2**40

    edit_manifest(bundle, change)
    refused(bundle, "emulator.safetensors", "at most")


def test_duplicate_key_in_the_manifest_is_refused(bundle):
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace("{", '{"dtype": "float16",', 1))
    refused(bundle, "manifest.json", "dtype", "twice")


def test_configuration_larger_than_the_tensors_is_refused(bundle):
    edit_manifest(bundle, _set("config", "ffn_dim", 2**30))
    refused(bundle, "adapter.safetensors", "expected (1073741824, 16)")


def test_altered_manifest_is_refused_by_name(bundle):
    edit_manifest(bundle, _set("format_version", 1))
    refused(bundle, "manifest.json", "format_version is 1")


MIDDLE = "middle.0.self_attn.v_proj.left"
OUTER = "model.decoder.layers.4.fc1.weight"


def _poison(tensors):
    tensors[MIDDLE] = tensors[MIDDLE].copy()
    tensors[MIDDLE][-1, -1] = np.nan


TENSOR_CHANGES = {
    "nan": (_poison, "NaN"),
    "infinite": (_set(MIDDLE, np.full((16, 5), np.inf, np.float32)), "Inf"),
    "transposed": (_set(MIDDLE, np.zeros((5, 16), np.float32)), "wrong shape"),
    "scalar": (_set(MIDDLE, np.zeros((), np.float32)), "wrong shape"),
    "other float": (_set(MIDDLE, np.zeros((16, 5), np.float16)), "wrong dtype"),
    "integer": (_set(MIDDLE, np.zeros((16, 5), np.int32)), "wrong dtype"),
    "missing": (lambda tensors: tensors.pop(MIDDLE), "missing"),
}


@pytest.mark.parametrize("change", TENSOR_CHANGES)
def test_altered_tensor_is_refused(bundle, change):
    apply, named = TENSOR_CHANGES[change]
    edit_tensors(bundle / "emulator.safetensors", apply)
    refused(bundle, "emulator.safetensors", MIDDLE, named)


def test_unexpected_tensor_is_refused(bundle):
    edit_tensors(bundle / "emulator.safetensors", _set("scores", np.zeros(2, np.float32)))
    refused(bundle, "emulator.safetensors", "unexpected: scores")


def test_adapter_tensor_of_another_layer_is_refused(bundle):
    def change(tensors):
        tensors[OUTER.replace("4", "3")] = tensors.pop(OUTER)

    edit_tensors(bundle / "adapter.safetensors", change)
    refused(bundle, "adapter.safetensors", f"missing: {OUTER}", "unexpected")


def test_file_that_is_no_safetensors_is_refused(bundle):
    (bundle / "adapter.safetensors").write_bytes(b"\xff" * 64)
    reseal(bundle)
    refused(bundle, "adapter.safetensors")


def test_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        receive(tmp_path / "absent")
