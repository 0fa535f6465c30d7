"""Manifests: what is written reads back, and every single thing out of place is refused."""

import copy
import json

import pytest

from gradot_jax.errors import InputError
from gradot_jax.offsite.manifest import AdapterManifest, BundleManifest, FileRecord

HUGE = 2**40
DIGEST = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def bundle(case) -> BundleManifest:
    return BundleManifest(
        config=case.config,
        split=case.split,
        dtype="bfloat16",
        base_digest=DIGEST,
        files={"README.md": FileRecord(DIGEST, 12)},
        emulator=case.spec(),
    )


@pytest.fixture(scope="module")
def adapter(case) -> AdapterManifest:
    return AdapterManifest(
        config=case.config,
        split=case.split,
        dtype="float32",
        base_digest=DIGEST,
        emulator_digest=DIGEST,
        files={"README.md": FileRecord(DIGEST, 12)},
    )


def test_manifests_survive_json(bundle, adapter):
    for manifest in (bundle, adapter):
        values = json.loads(json.dumps(manifest.to_values()))
        assert type(manifest).from_values(values, "m") == manifest


def test_one_kind_of_manifest_is_not_read_as_the_other(bundle, adapter):
    with pytest.raises(InputError, match="format is 'gradot-adapter'"):
        BundleManifest.from_values(adapter.to_values(), "m")
    with pytest.raises(InputError, match="format is 'gradot-bundle'"):
        AdapterManifest.from_values(bundle.to_values(), "m")


def _set(*path):
    *parents, key, value = path

    def change(values):
        for parent in parents:
            values = values[parent]
        values[key] = value

    return change


MANIFEST_CHANGES = {
    "unknown key": (_set("note", 1), "unknown keys ['note']"),
    "missing key": (lambda values: values.pop("base_digest"), "missing keys ['base_digest']"),
    "other format": (_set("format", "gradot-adapter"), "format"),
    "version bump": (_set("format_version", 3), "format_version is 3"),
    "version true": (_set("format_version", True), "format_version is True"),
    "config key": (_set("config", "auto_map", {}), "auto_map"),
    "config null": (_set("config", "ffn_dim", None), "ffn_dim"),
    "architecture": (_set("config", "architectures", ["Evil"]), "architectures"),
    "model type": (_set("config", "model_type", "gemma"), "model_type"),
    "activation": (_set("config", "activation_function", "__import__"), "activation_function"),
    "no heads": (_set("config", "num_attention_heads", 0), "num_attention_heads"),
    "huge ffn_dim": (_set("config", "ffn_dim", HUGE), "ffn_dim"),
    "many layers": (_set("config", "num_hidden_layers", 2**30), "num_hidden_layers"),
    "no middle": (_set("split", "num_bottom", 4), "no middle"),
    "negative split": (_set("split", "num_top", -1), "num_top"),
    "vast split": (_set("split", "num_top", HUGE), "num_top"),
    "rank too big": (_set("middle", 1, "ranks", "k_proj", 17), "middle 1: rank of k_proj: 17"),
    "rank zero": (_set("middle", 1, "ranks", "k_proj", 0), "rank of k_proj"),
    "rank true": (_set("middle", 1, "ranks", "k_proj", True), "rank of k_proj"),
    "rank fraction": (_set("middle", 1, "ranks", "k_proj", 4.0), "rank of k_proj"),
    "unknown site": (_set("middle", 0, "ranks", "fc1", 4), "fc1"),
    "too many channels": (_set("middle", 2, "num_channels", 33), "middle 2: num_channels: 33"),
    "channel list": (_set("middle", 2, "num_channels", [1]), "num_channels"),
    "kept indices": (_set("middle", 2, "channels", [1, 2]), "channels"),
    "middle object": (_set("middle", {}), "middle"),
    "map past the end": (_set("layer_map", [0, 1, 3]), "layer_map"),
    "map out of order": (_set("layer_map", [1, 0, 2]), "layer_map"),
    "map that comes back": (_set("layer_map", [0, 1, 0]), "layer_map"),
    "map that leaves a layer out": (_set("layer_map", [0, 1]), "uses 2 of 3 stored layers"),
    "map with too many places": (_set("layer_map", [0, 1, 2, 2]), "at most 3 places"),
    "map with an inner block": (_set("layer_map", [0, 1, None]), "places for inner blocks"),
    "map of a float": (_set("layer_map", [0, 0.0, 1]), "0.0 is no whole number"),
    "map that ends in a boolean": (_set("layer_map", [0, 1, True]), "True is no whole number"),
    "map of booleans": (_set("layer_map", [False, True, 2]), "layer_map"),
    "map missing": (lambda values: values.pop("layer_map"), "layer_map"),
    "inner block without place": (_set("split", "inner", [2]), "places for inner blocks"),
    "inner block outside": (_set("split", "inner", [0]), "inner must be ascending"),
    "inner blocks descending": (_set("split", "inner", [3, 2]), "inner must be ascending"),
    "inner number": (_set("split", "inner", 2), "inner"),
    "harmonizer too wide": (_set("middle", 0, {"harmonizer_rank": HUGE}), "harmonizer_rank"),
    "harmonizer with ranks": (_set("middle", 0, "harmonizer_rank", 2), "unknown keys"),
    "budget": (_set("budget", "mlp", 1.5), "budget mlp"),
    "markup in method": (_set("method", "[red]\x1b[31m"), "method"),
    "dtype": (_set("dtype", "float64"), "dtype"),
    "dtype list": (_set("dtype", ["float32"]), "dtype"),
    "short digest": (_set("base_digest", "00"), "base_digest"),
    "negative size": (_set("files", "README.md", "bytes", -1), "README.md"),
    "record key": (_set("files", "README.md", "mode", 7), "mode"),
    "files list": (_set("files", []), "files"),
}


@pytest.mark.parametrize("change", MANIFEST_CHANGES)
def test_altered_manifest_is_refused(bundle, change):
    apply, named = MANIFEST_CHANGES[change]
    values = copy.deepcopy(bundle.to_values())
    apply(values)
    with pytest.raises(InputError) as caught:
        BundleManifest.from_values(values, "manifest.json")
    assert str(caught.value).startswith("manifest.json")
    assert named in str(caught.value)
    assert str(caught.value).isprintable()


def test_more_layers_than_the_middle_has_are_refused(bundle):
    values = bundle.to_values()
    values["middle"].append(values["middle"][0])
    with pytest.raises(InputError, match="at most 3 layers"):
        BundleManifest.from_values(values, "m")


@pytest.mark.parametrize("values", [None, [], 3, {}, {"format": ["gradot-bundle"]}])
def test_what_is_no_manifest_at_all_is_refused(values):
    with pytest.raises(InputError, match="format"):
        BundleManifest.from_values(values, "m")


def test_adapter_manifest_takes_no_word_about_the_training(adapter):
    values = adapter.to_values() | {"loss": [3.2, 3.1]}
    with pytest.raises(InputError, match="loss"):
        AdapterManifest.from_values(values, "m")
