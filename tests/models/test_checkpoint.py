import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradot_jax.errors import InputError
from gradot_jax.files.safetensors import iterate_tensors, read_specs, write_tensors
from gradot_jax.models.checkpoint import load_model, save_model
from gradot_jax.models.opt.config import OPTConfig
from gradot_jax.models.params import get_block, segment_blocks, unstack_blocks
from gradot_jax.models.partition import param_shardings
from gradot_jax.models.run import forward
from gradot_jax.nn.linear import Dense, LowRank
from gradot_jax.parallel import make_mesh

VARIANTS = "pre_ln post_ln_projection no_final_norm untied no_bias no_affine gelu".split()
EMBED = "model.decoder.embed_tokens.weight"


def assert_same(left, right):
    if isinstance(left, tuple):
        assert left[0] == right[0]
        left, right = left[1], right[1]
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def checkpoint(golden, tmp_path):
    """A copy of a checkpoint, to be damaged."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model").mkdir(exist_ok=True)
        shutil.copyfile(golden / "pre_ln" / name, tmp_path / "model" / name)
    return tmp_path / "model"


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def edit_tensors(folder, change):
    tensors = dict(iterate_tensors(folder / "model.safetensors"))
    write_tensors(folder / "model.safetensors", change(tensors) or tensors, {"format": "pt"})


@pytest.mark.parametrize("form", ["flax", "flax_sharded"])
@pytest.mark.parametrize("variant", ["pre_ln", "post_ln_projection"])
def test_files_of_hugging_face_flax_hold_the_same_weights(golden, variant, form):
    assert_same(load_model(golden / variant / form), load_model(golden / variant))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 1500])
@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_and_loading_changes_nothing(golden, tmp_path, variant, max_shard_bytes):
    config, params = load_model(golden / variant)
    save_model(tmp_path / "out", config, params, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "out" / "model.safetensors").exists() == (max_shard_bytes > 1500)
    assert_same(load_model(tmp_path / "out"), (config, params))
    assert all(path.stat().st_size < 4096 for path in (tmp_path / "out").glob("model-*"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_round_trip(golden, tmp_path, dtype):
    config, params = load_model(golden / "pre_ln", dtype=dtype)
    assert params.shell.embed_tokens.dtype == jnp.dtype(dtype)
    save_model(tmp_path / "kept", config, params)
    assert_same(load_model(tmp_path / "kept", dtype=None), (config, params))
    full = load_model(golden / "pre_ln")[1]
    save_model(tmp_path / "cast", config, full, dtype=dtype)
    assert_same(load_model(tmp_path / "cast", dtype=None), (config, params))
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"] == dtype
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert_same(load_model(tmp_path / "cast")[1], widened)


def test_segments_are_written_in_depth_order(golden, tmp_path):
    config, params = load_model(golden / "pre_ln")
    blocks = [jax.tree.map(lambda leaf: leaf[None], b) for b in unstack_blocks(params.segments)]
    save_model(tmp_path / "out", config, params.replace(segments=tuple(blocks)))
    assert_same(load_model(tmp_path / "out")[1], params)


def test_low_rank_maps_are_multiplied_back(golden, tmp_path):
    config, params = load_model(golden / "pre_ln")
    first, second = unstack_blocks(params.segments)
    left, right = first.q_proj.kernel[:, :3], first.k_proj.kernel[:3]
    low = first.replace(q_proj=LowRank(left, right, first.q_proj.bias))
    save_model(tmp_path / "out", config, params.replace(segments=segment_blocks([low, second])))
    saved = get_block(load_model(tmp_path / "out")[1].segments[0], 0)
    np.testing.assert_allclose(saved.q_proj.kernel, left @ right, rtol=1e-6)


def test_bare_decoder_prefix_is_accepted(checkpoint):
    expected = load_model(checkpoint)
    edit_tensors(checkpoint, lambda t: {k.removeprefix("model."): v for k, v in t.items()})
    assert_same(load_model(checkpoint), expected)


def test_one_tensor_under_both_prefixes_is_refused(checkpoint):
    edit_tensors(checkpoint, lambda t: {**t, EMBED.removeprefix("model."): t[EMBED]})
    with pytest.raises(InputError, match=f"more than once: {EMBED}"):
        load_model(checkpoint)


def test_stored_head_of_a_tied_model_is_dropped_if_it_equals_the_embedding(checkpoint):
    expected = load_model(checkpoint)
    edit_tensors(checkpoint, lambda t: {**t, "lm_head.weight": t[EMBED]})
    assert_same(load_model(checkpoint), expected)
    edit_tensors(checkpoint, lambda t: {**t, "lm_head.weight": t[EMBED] + 1})
    with pytest.raises(InputError, match=r"lm_head.weight differs"):
        load_model(checkpoint)


def test_every_missing_unexpected_and_misshaped_tensor_is_named_at_once(checkpoint):
    def change(tensors):
        del tensors["model.decoder.layers.0.fc1.bias"]
        del tensors["model.decoder.layers.1.self_attn.q_proj.weight"]
        tensors["model.decoder.layers.2.fc1.bias"] = tensors[EMBED]
        tensors["score.weight"] = tensors[EMBED]
        tensors["model.decoder.layers.1.fc1.weight"] = tensors[
            "model.decoder.layers.1.fc1.weight"
        ].T

    edit_tensors(checkpoint, change)
    with pytest.raises(InputError) as caught:
        load_model(checkpoint)
    message = str(caught.value)
    for part in (
        str(checkpoint),
        "missing: model.decoder.layers.0.fc1.bias, model.decoder.layers.1.self_attn.q_proj.weight",
        "unexpected: model.decoder.layers.2.fc1.bias, score.weight",
        "model.decoder.layers.1.fc1.weight (got (8, 12), expected (12, 8))",
    ):
        assert part in message


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_not_finite_are_refused(checkpoint, bad):
    def change(tensors):
        tensors["model.decoder.layers.1.fc2.bias"][-1] = bad

    edit_tensors(checkpoint, change)
    with pytest.raises(InputError, match=r"layers\.1\.fc2\.bias holds NaN or Inf"):
        load_model(checkpoint)


@pytest.mark.parametrize("dtype", ["float64", "int32"])
def test_other_dtypes_are_refused(checkpoint, dtype):
    edit_tensors(checkpoint, lambda t: {**t, EMBED: t[EMBED].astype(dtype)})
    with pytest.raises(InputError, match=f"wrong dtype .*embed_tokens.weight .got {dtype}"):
        load_model(checkpoint)


def test_each_tensor_keeps_its_own_dtype_unless_one_is_asked_for(checkpoint, tmp_path):
    edit_tensors(checkpoint, lambda t: {**t, EMBED: t[EMBED].astype(np.float16)})
    float32 = jnp.dtype("float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(load_model(checkpoint)[1])} == {float32}
    config, params = load_model(checkpoint, dtype=None)
    assert params.shell.embed_tokens.dtype == jnp.float16
    others = params.replace(shell=params.shell.replace(embed_tokens=None))
    assert {leaf.dtype for leaf in jax.tree.leaves(others)} == {float32}
    save_model(tmp_path / "again", config, params)
    specs = [
        read_specs(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "again")
    ]
    assert specs[0] == specs[1]
    assert_same(load_model(tmp_path / "again", dtype=None), (config, params))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [(("float16", "float32"), "float32"), (("float16", "bfloat16"), "float32")],
)
def test_layers_of_unlike_dtypes_are_stacked_in_the_least_that_holds_both(
    checkpoint, dtypes, expected
):
    names = [f"model.decoder.layers.{layer}.fc1.weight" for layer in range(2)]

    def change(tensors):
        for name, dtype in zip(names, dtypes, strict=True):
            tensors[name] = tensors[name].astype(jnp.dtype(dtype))

    edit_tensors(checkpoint, change)
    tensors = dict(iterate_tensors(checkpoint / "model.safetensors"))
    assert [tensors[name].dtype.name for name in names] == list(dtypes)
    kernel = load_model(checkpoint, dtype=None)[1].segments[0].fc1.kernel
    assert kernel.dtype == expected
    for layer, name in enumerate(names):
        np.testing.assert_array_equal(kernel[layer], tensors[name].astype(np.float32).T)


@pytest.mark.parametrize("name", ["decoder.version", "model.decoder.version"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_version_number_of_old_checkpoints_is_dropped(checkpoint, name, prefix):
    expected = load_model(checkpoint)
    version = np.array([3], np.float32)

    def change(tensors):
        return {prefix + k.removeprefix("model."): v for k, v in tensors.items()} | {name: version}

    edit_tensors(checkpoint, change)
    assert_same(load_model(checkpoint), expected)
    assert_same(load_model(checkpoint, dtype=None), expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        ({"num_hidden_layers": 3}, r"missing: model.decoder.layers.2.fc1.bias"),
        ({"num_hidden_layers": 2**30}, "weights are only 36 tensors"),
        ({"hidden_size": 2**30, "word_embed_proj_dim": 2**30}, "wrong shape"),
        ({"do_layer_norm_before": False}, "unexpected: model.decoder.final_layer_norm.bias"),
        ({"tie_word_embeddings": False}, "missing: lm_head.weight"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(checkpoint, changes, reason):
    edit_config(checkpoint, **changes)
    with pytest.raises(InputError, match=reason):
        load_model(checkpoint)


def test_a_truncated_or_absent_file_is_refused_by_name(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors: damaged or truncated"):
        load_model(checkpoint)
    weights.unlink()
    with pytest.raises(InputError, match="no weights found"):
        load_model(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: missing"):
        load_model(checkpoint)


def test_an_unknown_dtype_is_refused(checkpoint):
    with pytest.raises(InputError, match="'int8' is not one of float32"):
        load_model(checkpoint, dtype="int8")


def test_sharded_load_equals_unsharded(random_params, tmp_path, assert_close):
    config = OPTConfig(
        vocab_size=24,
        hidden_size=16,
        word_embed_proj_dim=8,
        num_hidden_layers=2,
        ffn_dim=32,
        num_attention_heads=4,
        max_position_embeddings=8,
        tie_word_embeddings=False,
    )
    params = random_params(config)
    save_model(tmp_path / "out", config, params)
    mesh = make_mesh(2, 4)
    _, sharded = load_model(tmp_path / "out", mesh=mesh)
    assert_same(sharded, params)
    jax.tree.map(
        lambda leaf, sharding: chex.assert_equal(leaf.sharding, sharding),
        sharded,
        param_shardings(params, mesh),
    )
    assert "model" in sharded.segments[0].fc1.kernel.sharding.spec
    ids = jax.device_put(np.arange(12).reshape(2, 6), mesh.batched)
    assert_close(forward(config, sharded, ids), forward(config, params, ids), "float32")
    save_model(tmp_path / "again", config, sharded)
    assert_same(load_model(tmp_path / "again")[1], params)


def test_tokenizer_files_are_copied_byte_for_byte_and_nothing_else(golden, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    contents = {
        "tokenizer.json": b"{ }\r\n",
        "tokenizer_config.json": b"{}",
        "generation_config.json": b'{"bos_token_id":  2}',
    }
    for name, content in {**contents, "modeling.py": b"", "pytorch_model.bin": b""}.items():
        (source / name).write_bytes(content)
    config, params = load_model(golden / "pre_ln")
    save_model(tmp_path / "out", config, params, tokenizer_from=source)
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert written.keys() == contents.keys() | {"config.json", "model.safetensors"}
    assert contents.items() <= written.items()


def test_nothing_is_written_when_saving_fails(golden, tmp_path):
    config, params = load_model(golden / "pre_ln")
    block = params.segments[0]

    def with_fc2(kernel):
        return params.replace(segments=(block.replace(fc2=Dense(kernel, block.fc2.bias)),))

    kernel = block.fc2.kernel
    cases = [
        (params, {"tokenizer_from": golden}, "no tokenizer"),
        (params, {"dtype": "float64"}, "'float64' is not one of"),
        (with_fc2(kernel.at[1, 0, 0].set(jnp.nan)), {}, r"layers\.1\.fc2\.weight holds NaN"),
        (with_fc2(kernel.at[1, 0, 0].set(1e6)), {"dtype": "float16"}, "range of float16"),
        (with_fc2(kernel[:, 1:]), {}, r"layers\.0\.fc2\.weight has shape \(8, 11\)"),
        (params.replace(segments=()), {}, "says 2 layers, the weights have 0"),
        (params.replace(shell=params.shell.replace(final_layer_norm=None)), {}, "weights lack"),
    ]
    for broken, options, reason in cases:
        with pytest.raises(InputError, match=reason):
            save_model(tmp_path / "out", config, broken, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_checkpoint_is_kept_unless_overwriting(golden, tmp_path):
    config, params = load_model(golden / "pre_ln")
    save_model(tmp_path / "out", config, params)
    with pytest.raises(InputError, match="not empty"):
        save_model(tmp_path / "out", config, params)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    save_model(tmp_path / "out", config, doubled, overwrite=True)
    assert_same(load_model(tmp_path / "out")[1], doubled)
