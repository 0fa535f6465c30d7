import json
import os
import shutil

import huggingface_hub.constants
import jax
import numpy as np
import pytest
from flax.serialization import msgpack_serialize

from gradot_jax.errors import InputError
from gradot_jax.models.checkpoint import load_model, save_model
from gradot_jax.models.opt import OPT
from gradot_jax.models.weight_files import open_weights, tokenizer_files

COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def sharded(golden, tmp_path):
    """A sharded checkpoint, its index and its shards in order."""
    config, params = load_model(golden / "pre_ln")
    save_model(tmp_path / "model", config, params, max_shard_bytes=4000)
    folder = tmp_path / "model"
    return folder, folder / "model.safetensors.index.json", sorted(folder.glob("model-*"))


@pytest.fixture
def flax_checkpoint(golden, tmp_path):
    shutil.copytree(golden / "pre_ln" / "flax", tmp_path / "flax")
    return tmp_path / "flax"


def edit_map(index, change):
    values = json.loads(index.read_text())
    change(values["weight_map"])
    index.write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "", "sub/x", 3, ["x"]])
def test_an_index_entry_that_leads_elsewhere_is_refused(sharded, name):
    folder, index, _ = sharded
    (folder.parent / "secret").touch()
    edit_map(index, lambda listed: listed.update({next(iter(listed)): name}))
    with pytest.raises(InputError, match=r"is not the plain name|expected a weight_map"):
        load_model(folder)


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(sharded):
    folder, _, shards = sharded
    outside = folder.parent / "outside"
    shards[0].rename(outside)
    shards[0].symlink_to(outside)
    with pytest.raises(InputError, match="is a symbolic link"):
        load_model(folder)


def test_a_missing_or_truncated_shard_is_refused_by_name(sharded):
    folder, _, shards = sharded
    content = shards[-1].read_bytes()
    shards[-1].write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"{shards[-1].name}: damaged or truncated"):
        load_model(folder)
    shards[-1].unlink()
    with pytest.raises(InputError, match=f"{shards[-1].name}: missing"):
        load_model(folder)


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded):
    folder, index, _ = sharded
    edit_map(index, lambda listed: listed.update({next(iter(listed)): [*listed.values()][-1]}))
    with pytest.raises(InputError, match="index and shards disagree about model"):
        load_model(folder)


def test_an_index_without_a_map_is_refused(sharded):
    folder, index, _ = sharded
    index.write_text("{}")
    with pytest.raises(InputError, match="expected a weight_map"):
        load_model(folder)


def test_safetensors_come_before_msgpack(golden, flax_checkpoint):
    shutil.copy(golden / "pre_ln" / "model.safetensors", flax_checkpoint)
    (file,) = open_weights(flax_checkpoint, OPT.canonical_name)
    assert file.path.name == "model.safetensors"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tf_model.h5"])
def test_formats_not_read_are_refused_with_the_way_to_convert_them(golden, tmp_path, name):
    shutil.copy(golden / "pre_ln" / "config.json", tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(InputError) as caught:
        load_model(tmp_path)
    assert name in str(caught.value)
    assert "from transformers import AutoModelForCausalLM" in str(caught.value)
    assert "save_pretrained" in str(caught.value)


def test_damaged_msgpack_is_refused_by_name(flax_checkpoint):
    path = flax_checkpoint / "flax_model.msgpack"
    whole = path.read_bytes()
    damaged = [
        whole[:-1],
        whole[: len(whole) // 2],
        b"",
        whole + b"\0",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1a" * 5000,
        msgpack_serialize({"model": {"decoder": {"note": "text"}}}),
        msgpack_serialize({"model": {"decoder": {"number": 3}}}),
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"flax_model\.msgpack: damaged or truncated"):
            load_model(flax_checkpoint)


def test_unexpected_msgpack_content_is_refused_like_any_other(flax_checkpoint):
    decoder = {
        "embed_tokens": {"embedding": np.zeros((23, 8), np.int32)},
        "project_in": {"kernel": np.zeros((2, 3), np.complex64)},
        "extra": {"bias": np.zeros(3, np.float32)},
    }
    path = flax_checkpoint / "flax_model.msgpack"
    path.write_bytes(msgpack_serialize({"model": {"decoder": decoder}}))
    with pytest.raises(InputError) as caught:
        load_model(flax_checkpoint)
    assert "embed_tokens.weight (got int32)" in str(caught.value)
    assert "unexpected: model.decoder.extra.bias, model.decoder.project_in" in str(caught.value)


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "gone", str(tmp_path / "gone"), tmp_path / "file", "a/b/c"):
        with pytest.raises(InputError, match="there is no such folder"):
            load_model(path)


def test_a_local_folder_takes_no_revision(golden):
    with pytest.raises(InputError, match="has no revision"):
        load_model(golden / "pre_ln", revision="main")


@pytest.fixture
def hub_cache(golden, tmp_path, monkeypatch):
    """A cache of the Hub, without a network, in which `main` and a tag are two commits."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--some--opt"
    sources = (golden / "pre_ln", golden / "post_ln_projection" / "flax_sharded")
    for ref, commit, source in zip(("main", "v1"), COMMITS, sources, strict=True):
        snapshot = repository / "snapshots" / commit
        for folder in (snapshot, repository / "blobs", repository / "refs"):
            folder.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
        for path in source.iterdir():
            if path.is_file():
                blob = repository / "blobs" / f"{commit[0]}{path.name}"
                shutil.copyfile(path, blob)
                (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return repository


def test_a_hub_id_is_loaded_from_the_cache_at_each_revision(golden, hub_cache):
    for revision, variant in (
        (None, "pre_ln"),
        ("main", "pre_ln"),
        ("v1", "post_ln_projection"),
        (COMMITS[1], "post_ln_projection"),
    ):
        config, params = load_model("some/opt", revision=revision)
        expected = load_model(golden / variant)
        assert config == expected[0]
        jax.tree.map(np.testing.assert_array_equal, params, expected[1])


def test_a_snapshot_may_be_given_as_a_folder(golden, hub_cache):
    config, _ = load_model(hub_cache / "snapshots" / COMMITS[0])
    assert config == load_model(golden / "pre_ln")[0]


def test_what_the_cache_has_not_is_refused_by_id_and_revision(hub_cache):
    with pytest.raises(InputError, match=r"some/other is neither a folder here"):
        load_model("some/other")
    with pytest.raises(InputError, match=r"some/opt at revision v9 is neither"):
        load_model("some/opt", revision="v9")


def test_tokenizer_files_are_the_allowed_ones_and_no_links(tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenization.py", "README.md"):
        (tmp_path / name).touch()
    assert [path.name for path in tokenizer_files(tmp_path)] == ["vocab.json", "merges.txt"]
    (tmp_path / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="is a symbolic link"):
        tokenizer_files(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.json").touch()
    with pytest.raises(InputError, match="no tokenizer"):
        tokenizer_files(tmp_path)
